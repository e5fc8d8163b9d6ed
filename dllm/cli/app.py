"""The verbs of `python -m dllm`: which there are, what each accepts, and which module does the work.

Refuses to do any of the work, and imports what does it only once a verb is called, so that --help is quick.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from dllm.cli import regenerate as regenerate_verb
from dllm.stages import STAGES

HELP = {
    "prepare": "Collect prompts as chats, and hold some out.",
    "regenerate": "Let the target answer every prompt.",
    "train": "Train a draft on the target's own words.",
    "evaluate": "Decode speculatively on held-out prompts, against plain decoding.",
    "register": "Make the checkpoint a version of an MLflow registered model.",
}
"""Help text of each stage."""

ParamsPath = Annotated[Path, typer.Option("--params", help="Params file, relative to --root.", show_default=True)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one value, e.g. train.epochs=2. Repeatable.")
]
Root = Annotated[Path, typer.Option("--root", help="The project's folder: holds params.yaml, work/ and out/.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print a traceback when something fails.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a params.yaml whose values are those of no recipe.")]


app = typer.Typer(
    name="dllm",
    help="Train, measure and register models that write in parallel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes = typer.Typer(help="List, show and activate the shipped params files.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")
data = typer.Typer(help="Check, look at and merge folders of regenerated answers.", no_args_is_help=True)
app.add_typer(data, name="data")


def _stage_verb(name: str) -> Callable[..., None]:
    def verb(
        params: ParamsPath = Path("params.yaml"),
        overrides: Overrides = [],  # noqa: B006 (typer copies the default)
        root: Root = Path(),
        debug: Debug = False,
    ) -> None:
        _run_stage(name, params, overrides, root)

    return verb


def _run_stage(name: str, params: Path, overrides: Sequence[str], root: Path) -> None:
    import importlib

    from dllm.config.load import load_params

    root = root.resolve()
    checked = load_params(root / params, overrides)
    importlib.import_module(f"dllm.stages.{name}").run(checked, root)


for _name in STAGES:
    _help = HELP[_name]
    if _name == "regenerate":  # also a command of its own, for those who want only this
        _help += " With --input-data: any chats, without a project."
        app.command(_name, help=_help)(regenerate_verb.command(functools.partial(_run_stage, _name)))
    else:
        app.command(_name, help=_help)(_stage_verb(_name))


@app.command()
def generate(
    checkpoint: Annotated[
        str, typer.Option(help="models:/NAME@ALIAS, a checkpoint folder, a training step's, or a stage's output.")
    ],
    prompt: Annotated[list[str], typer.Option(help="What the user says. Repeatable.")] = [],  # noqa: B006
    batch_file: Annotated[
        Path | None,
        typer.Option(help="More prompts: one a line, or .jsonl with the key `prompt`; - reads them from the input."),
    ] = None,
    sampler: Annotated[
        Literal["dflash", "ar", "llada", "llada2", "nemotron", "self-spec"] | None,
        typer.Option(help="By default the one that fits the checkpoint."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens an answer may have.", show_default="256")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=0, help="Slots a round or columns a block; 0 takes the checkpoint's.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Another target than the draft was trained for.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt itself, without a chat template.")] = False,
    infill: Annotated[
        bool, typer.Option("--infill", help="Write the prompt's [MASK] (one token) and [MASK:n] spans.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Show the canvas as it fills.")] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Forward passes, at least one a block; by default one a token.")
    ] = None,
    schedule: Annotated[
        Literal["even", "cosine"] | None, typer.Option(help="How tokens are spread over steps: cosine has few first.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0, the default, is greedy.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Draw from the likeliest tokens that hold so much.")
    ] = None,
    remasking: Annotated[
        Literal["low_confidence", "random", "entropy", "margin"] | None,
        typer.Option(help="Which proposals are kept first."),
    ] = None,
    threshold: Annotated[float | None, typer.Option(min=0, max=1, help="Commit all proposals surer than this.")] = None,
    factor: Annotated[float | None, typer.Option(min=0, help="Commit by Fast-dLLM's factor rule.")] = None,
    entropy_bound: Annotated[
        float | None, typer.Option(min=0, help="Commit the places of least entropy; needs --remasking entropy.")
    ] = None,
    cfg_scale: Annotated[float | None, typer.Option(min=0, help="Guidance by the prompt; doubles the passes.")] = None,
    cache: Annotated[
        Literal["none", "prefix", "dual", "block"] | None,
        typer.Option(help="Keys and values kept between passes; `block` is exact, for block-causal models."),
    ] = None,
    editing_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Rewrite a block's tokens where another is surer than this.")
    ] = None,
    max_post_steps: Annotated[
        int | None, typer.Option(min=0, help="Most passes that only edit a block.", show_default="16")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of what is drawn: at temperatures above 0, and by --remasking random.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts that a diffusion model writes together.", show_default="8")
    ] = None,
    mask_token_id: Annotated[
        int | None, typer.Option(min=0, help="Of a masked diffusion model that another tool has trained.")
    ] = None,
    own_generate: Annotated[
        bool | None,
        typer.Option("--own-generate/--no-own-generate", help="Through the generation code that the model brings."),
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code the model brings.")] = False,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model with code of its own.")] = None,
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Answer prompts with a draft and its target, or with a diffusion model; print tokens per pass."""
    from dllm.cli import generate as generation
    from dllm.decoding.diffusion import GenerateOptions

    named = {
        "steps": steps,
        "schedule": schedule,
        "temperature": temperature,
        "top_p": top_p,
        "remasking": remasking,
        "threshold": threshold,
        "factor": factor,
        "entropy_bound": entropy_bound,
        "cfg_scale": cfg_scale,
        "cache": cache,
        "editing_threshold": editing_threshold,
        "max_post_steps": max_post_steps,
        "seed": seed,
    }
    generation.generate(
        checkpoint=checkpoint,
        prompts=prompt,
        batch_file=batch_file,
        sampler=sampler,
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        target=target,
        as_json=as_json,
        show=show,
        trust_remote_code=trust_remote_code,
        revision=revision,
        mask_token_id=mask_token_id,
        root=root.resolve(),
        wishes=GenerateOptions(
            raw=raw, infill=infill, batch_size=batch_size, own_generate=own_generate, settings=named
        ),
    )


@app.command("lm-eval")
def lm_eval(
    checkpoint: Annotated[str, typer.Option(help="As for generate, or builtin:NAME; plain causal models too.")],
    tasks: Annotated[str, typer.Option(metavar="NAME[,NAME]", help="Tasks, groups or tags.")],
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of task files; without it the harness's own tasks, off the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one pass.")] = 8,
    samples: Annotated[int, typer.Option(min=2, help="Masks an answer, where its likelihood is a bound.")] = 128,
    seed: Annotated[int, typer.Option(help="Of masks and of sampling.")] = 0,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens a text may have; at most the model's.")] = None,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="Ask as chats.")] = False,
    check_greedy: Annotated[
        bool | None,
        typer.Option(
            "--check-greedy/--no-check-greedy",
            help="Also decode, to tell if an answer is the greedy one; by default where a task asks.",
        ),
    ] = None,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Let tasks run what the model writes.")
    ] = False,
    sampler: Annotated[
        Literal["ar", "llada", "llada2", "nemotron", "self-spec"] | None,
        typer.Option(help="By default the one that fits the checkpoint."),
    ] = None,
    gen: Annotated[
        list[str],
        typer.Option(metavar="KEY=VALUE", help="Goes before a task's generation_kwargs, e.g. steps=32. Repeatable."),
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code the model brings.")] = False,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model with code of its own.")] = None,
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a checkpoint; print a table, and what its likelihoods are."""
    from dllm.cli import lm_eval as verb

    verb.run(
        checkpoint=checkpoint,
        tasks=[name.strip() for name in tasks.split(",") if name.strip()],
        include_path=include_path,
        root=root.resolve(),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        samples=samples,
        seed=seed,
        max_length=max_length,
        apply_chat_template=apply_chat_template,
        check_greedy=check_greedy,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        sampler=sampler,
        generation=gen,
        as_json=as_json,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )


@app.command()
def serve(
    params: ParamsPath = Path("params.yaml"),
    overrides: Overrides = [],  # noqa: B006 (typer copies the default)
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Start SGLang with the target, print its address once it has written a token, and stay until Ctrl-C."""
    from dllm.cli import serve as server
    from dllm.config.load import load_params

    root = root.resolve()
    server.run(load_params(root / params, overrides), root)


@app.command()
def report(root: Root = Path(), debug: Debug = False) -> None:
    """Print one table of what the stages under out/ found."""
    from dllm.cli import report as tables

    tables.print_report(root.resolve())


@recipes.command("list")
def list_recipes(debug: Debug = False) -> None:
    """Name every recipe, with its first comment line."""
    from dllm.config import recipe_book

    for name, summary in recipe_book.summaries().items():
        typer.echo(f"{name:34}{summary}")


@recipes.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A name from `recipe list`.")], debug: Debug = False) -> None:
    """Print a recipe as `use` writes it: every key, defaults included."""
    from dllm.config import recipe_book

    typer.echo(recipe_book.text(name), nl=False)


@recipes.command("use")
def use_recipe(
    name: Annotated[str, typer.Argument(help="A name from `recipe list`.")],
    params: ParamsPath = Path("params.yaml"),
    force: Force = False,
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Write a recipe to params.yaml with every key, unless the file there has values of its own."""
    from dllm.config import recipe_book

    path = root.resolve() / params
    recipe_book.activate(name, path, force=force)
    typer.echo(f"{path.name} is now {name}")


Answers = Annotated[Path, typer.Argument(metavar="D", help="A folder of answers: shards and a manifest.")]


@data.command("verify")
def verify_data(
    folder: Answers,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Check every hash, row and count against the manifest."""
    from dllm.cli import data as verbs

    verbs.verify(folder, as_json=as_json)


@data.command("show")
def show_data(
    folder: Answers,
    row: Annotated[int | None, typer.Option(min=0, help="This row alone, 0-based.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Rows of this prompt: its id, or how it begins.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many rows.")] = 3,
    tokens: Annotated[bool, typer.Option("--tokens", help="Token by token, with ids.")] = False,
    max_length: Annotated[int | None, typer.Option(min=1, help="As train.max_length; what is longer is cut.")] = None,
    model: Annotated[str | None, typer.Option(help="Take this model's tokenizer, not the manifest's.")] = None,
    debug: Debug = False,
) -> None:
    """Print rows, with the tokens marked that training supervises."""
    from dllm.cli import data as verbs

    verbs.show(folder, row=row, prompt=prompt, limit=limit, tokens=tokens, max_length=max_length, model=model)


@data.command("merge")
def merge_data(
    folders: Annotated[list[Path], typer.Argument(metavar="D1 D2 ...", help="The parts, in any order.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Where the whole goes: new, or empty.")],
    debug: Debug = False,
) -> None:
    """Make one folder of all parts of a regeneration; no row is written anew."""
    from dllm.cli import data as verbs

    verbs.merge(folders, output_dir)
