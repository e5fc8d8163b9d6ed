"""Inputs of people who do this job, by kind, and the test that runs each."""

from __future__ import annotations

import re

import pytest

from tests.arch.source_tree import ROOT

CASES = {
    "K1 a chat, a turn or a question as a text of JSON": (
        "prompts/test_turns.py::test_a_question_that_looks_like_json_stays_a_text",
        "prompts/test_turns.py::test_a_chat_written_as_text_or_by_key_is_the_same_chat",
        "prompts/test_cells.py::test_every_text_of_a_chat_gives_its_turns",
        "prompts/test_cells.py::test_a_question_stays_as_it_is",
        "prompts/test_cells.py::test_a_damaged_chat_is_no_question",
        "prompts/test_transcripts.py::test_a_chat_that_is_written_as_one_text_is_named",
    ),
    "K2 one content in any container, calls and arguments to any depth": (
        "borders/test_containers.py::test_every_container_gives_the_same_prompts",
        "borders/test_containers.py::test_datasets_own_files_give_the_same_prompts",
        "borders/test_containers.py::test_null_arguments_are_absent_in_structs_and_in_what_is_written_from_them",
        "borders/test_containers.py::test_null_arguments_of_a_text_are_kept_in_every_container",
        "prompts/test_turns.py::test_every_spelling_of_calls_and_results_makes_the_same_prompt",
        "borders/test_odd_inputs.py::test_texts_that_a_writer_left_as_bytes_are_texts",
        "borders/test_odd_inputs.py::test_schemas_of_other_vendors_are_read_or_refused_as_what_they_are",
        "prompts/test_tools.py::test_arguments_are_read_under_every_name",
        "prompts/test_tools.py::test_arguments_under_an_unknown_name_are_refused_by_it",
        "prompts/test_turns.py::test_ids_that_are_numbers_are_ids",
    ),
    "K2 calls that old responses spell as text": (
        "regeneration/test_rollout.py::test_calls_that_old_responses_spell_as_text_are_generated_again_as_calls",
        "prompts/test_tools.py::test_calls_that_are_spelt_in_a_text_are_counted",
        "prompts/test_tools.py::test_calls_in_python_are_counted_each_and_texts_that_are_calls_as_a_whole",
    ),
    "K3 columns that shape the prompt: system, tools, images, input, template arguments": (
        "borders/test_containers.py::test_a_system_column_is_a_system_turn",
        "borders/test_containers.py::test_tools_are_used_wherever_a_row_has_them",
        "borders/test_containers.py::test_rows_with_pictures_or_sounds_are_refused_and_counted",
        "borders/test_containers.py::test_alpaca_rows_are_joined",
        "prompts/test_reading.py::test_a_row_with_a_picture_is_refused_however_its_column_is_named",
        "prompts/test_reading.py::test_a_system_prompt_is_one_however_its_column_is_named",
        "prompts/test_reading.py::test_tools_without_schemas_are_not_nothing",
        "prompts/test_turns.py::test_a_system_turn_before_the_last_answer_stays",
        "prompts/test_column_names.py::test_what_looks_like_a_part_of_the_prompt_is_not_dropped",
        "prompts/test_column_names.py::test_parts_of_the_prompt_are_found_wherever_a_row_has_them",
        "prompts/test_column_names.py::test_what_is_said_about_a_prompt_is_listed",
        "prompts/test_column_names.py::test_a_turn_s_own_parts_of_the_prompt_are_not_dropped",
        "prompts/test_column_names.py::test_a_response_that_is_only_begun_is_not_dropped",
        "borders/test_odd_inputs.py::test_arguments_of_the_template_and_names_of_users_are_not_dropped_in_silence",
    ),
    "K4 an option without effect": (
        "borders/test_containers.py::test_an_option_without_effect_is_refused",
        "borders/test_containers.py::test_splits_of_a_folder_are_chosen_or_refused",
        "prompts/test_folder.py::test_splits_have_many_names",
        "prompts/test_folder.py::test_the_splits_that_a_dataset_s_card_names_come_before_those_of_names",
        "prompts/test_row_layout.py::test_rows_of_several_splits_in_one_file_are_not_all_trained_on",
        "regeneration/test_standalone.py::test_bad_flags_are_one_line",
    ),
    "K5 files passed over, damaged, or of another kind than their name": (
        "borders/test_containers.py::test_files_of_a_folder_are_read_or_named",
        "borders/test_odd_inputs.py::test_a_file_that_is_not_what_its_name_says_is_named",
        "prompts/test_folder.py::test_a_missing_shard_is_named",
        "prompts/test_readers.py::test_a_stream_whose_writer_was_killed_is_not_half_of_the_rows",
        "prompts/test_row_layout.py::test_rows_inside_of_one_object_are_named_also_beside_other_files",
        "prompts/test_readers.py::test_an_encoding_that_is_not_read_is_named",
        "borders/test_odd_inputs.py::test_a_name_that_is_no_source_is_refused",
        "borders/test_odd_inputs.py::test_an_empty_file_and_a_link_to_a_folder_are_listed",
    ),
    "K6 limits of the model, in every engine": (
        "borders/test_server_words.py::test_prompts_longer_than_the_model_s_positions_are_rejected_by_every_engine",
        "borders/test_positions.py::test_all_who_read_a_target_take_the_same_positions",
    ),
    "K7 switches of drafts": (
        "borders/test_draft_configs.py::test_what_would_be_decoded_otherwise_is_refused_by_its_name",
        "borders/test_draft_configs.py::test_windows_and_causality_are_read_by_one_rule",
    ),
    "K7 switches of targets and diffusion models": (
        "borders/test_target_configs.py::test_a_key_that_the_model_code_never_names_is_refused",
        "borders/test_target_configs.py::test_weights_that_the_config_does_not_describe_are_refused",
        "borders/test_target_configs.py::test_attention_that_the_local_engine_has_not_is_refused_before_weights_are_read",
        "borders/test_target_configs.py::test_a_llada_with_a_switch_that_llama_has_not_is_refused",
        "borders/test_target_configs.py::test_a_diffusion_model_of_own_code_that_no_family_knows_is_refused_by_name",
    ),
    "K8 paths in URIs": ("borders/test_uris.py::test_stores_lie_inside_the_project_and_registered_versions_load",),
    "K9 secrets": ("borders/test_secrets.py::test_a_stage_leaves_no_secret_whether_it_succeeds_or_fails",),
    "K10 proxies": (
        "borders/test_proxy.py::test_every_client_reaches_loopback",
        "borders/test_proxy.py::test_the_flow_and_its_server_meet_without_the_proxy",
    ),
    "K11 one row decides over all": (
        "borders/test_containers.py::test_a_bad_row_is_set_aside_counted_and_named",
        "prompts/test_turns.py::test_nothing_is_asked_of_the_turn_that_is_generated_again",
        "prompts/test_turns.py::test_a_turn_of_unknown_role_after_the_last_answer_goes_with_it",
    ),
    "K12 what a server says": (
        "borders/test_server_words.py::test_an_error_inside_a_200_is_one_rejected_row_in_the_server_s_words",
        "borders/test_server_words.py::test_a_reply_under_another_name_of_the_same_model_is_accepted",
        "borders/test_server_words.py::test_pages_of_proxies_are_shown",
        "borders/test_uris.py::test_an_address_that_mlflow_cannot_use_gets_its_own_hint",
    ),
    "K14 outside git": (
        "borders/test_git.py::test_another_users_repository",
        "borders/test_git.py::test_a_copy_outside_git_names_what_to_do",
    ),
    "K15 what is not supported or not installed": (
        "borders/test_target_configs.py::test_a_target_that_no_draft_can_be_made_for_is_refused_by_prepare",
        "borders/test_target_configs.py::test_a_config_that_cannot_be_built_is_one_line_at_prepare_and_at_load",
    ),
}
"""Tests by kind of fault, as the issue on borders numbers them."""


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_of_case_has_its_test(kind: str) -> None:
    for named in CASES[kind]:
        file, _, test = named.partition("::")
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), named
