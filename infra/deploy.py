"""Put this project's work pools, deployments and automations on the Prefect server that PREFECT_API_URL names.

`make serve` does it for its own server. Run again, it makes what is missing, and brings deployments and automations up
to date. What a user has set stays: types, limits and templates of pools, schedules, and which automation is on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect import get_client
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.events import AutomationCore, EventTrigger, Posture
from prefect.events.actions import ActionTypes, ChangeFlowRunState, DoNothing, RunDeployment, SendNotification
from prefect.exceptions import ObjectAlreadyExists

ROOT = Path(__file__).resolve().parents[1]
POOLS = ("local", "checkouts", "parts")
ALERTS = "DLLM_ALERTS_URL"
"""A webhook that takes {"text": ...}, as Slack's and Mattermost's do: what the automations below report goes there."""
NEW_RESPONSES = "regenerate-parts.finished"
"""The event of `flows/regenerate_parts.py`; its payload has the folder."""
NIGHTLY = DeploymentScheduleCreate(
    schedule=CronSchedule(cron="0 2 * * *", timezone="UTC"), active=False, slug="nightly"
)
"""An example: paused until somebody switches it on."""
SCHEDULED = "pipeline/dflash"
TEMPLATES = {kind: ROOT / "infra" / kind / "work-pool.json" for kind in ("docker", "kubernetes")}
"""Base job templates of work pools that are none of processes."""
SILENT = timedelta(minutes=9)
"""Three heartbeats of a flow run."""
UNSTARTED, QUEUED, LONG = timedelta(minutes=30), timedelta(hours=1), timedelta(days=1)
CANCELLED = timedelta(minutes=2)
RUN = "prefect.flow-run"
ENDS = {f"{RUN}.{name}" for name in ("Completed", "Failed", "Crashed", "Cancelled")}


def main(arguments: list[str]) -> None:
    """Make all of it, in an order in which each finds what it names."""
    parser = argparse.ArgumentParser(prog="python infra/deploy.py", description="Deploy this project's flows.")
    parser.add_argument("--type", choices=["process", *TEMPLATES], default="process", help="of pools that are made")
    kind = parser.parse_args(arguments).type
    with get_client(sync_client=True) as client:
        for pool in POOLS:
            make_pool(client, pool, kind)
        deploy()
        scheduled = client.read_deployment_by_name(SCHEDULED)
        if not client.read_deployment_schedules(scheduled.id):
            client.create_deployment_schedules(scheduled.id, [NIGHTLY])
        report = alert()
        trained = client.read_deployment_by_name("pipeline/project")
        for automation in [*watches(report), on_new_responses(trained.id)]:
            put(client, automation)


def make_pool(client: SyncPrefectClient, name: str, kind: str) -> None:
    """Make a work pool; one that is there stays as it is, of whatever type."""
    if kind in TEMPLATES:
        template = json.loads(TEMPLATES[kind].read_text())
    else:
        shipped = client.request("GET", "/collections/views/{view}", path_params={"view": "aggregate-worker-metadata"})
        template = shipped.json()["prefect"][kind]["default_base_job_configuration"]
    with contextlib.suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))


def deploy() -> None:
    """Deploy the flows of prefect.yaml."""
    argv = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"dllm: `prefect deploy --all` failed: {' '.join(done.stdout.split())[-300:]}")


def alert() -> ActionTypes:
    """Return what reports to people: the webhook, or else nothing but the list of events in Prefect's pages."""
    if not (address := os.environ.get(ALERTS)):
        return DoNothing()
    block = CustomWebhookNotificationBlock(
        name="dllm", url="{{address}}", json_data={"text": "{{subject}}\n{{body}}"}, secrets={"address": address}
    )
    subject = "{{ automation.name }}: {{ flow_run.name }}"
    body = "{{ flow_run.state.name }}: {{ flow_run.state.message }} {{ flow_run|ui_url }}"
    return SendNotification(block_document_id=block.save("dllm-alerts", overwrite=True), subject=subject, body=body)


def watches(report: ActionTypes) -> list[AutomationCore]:
    """List what is done about flow runs that crash, hang, or wait too long."""
    crash = StateType.CRASHED
    return [
        _watch(
            "dllm: mark as crashed what has gone silent",
            {f"{RUN}.heartbeat"}, {f"{RUN}.*"}, SILENT,
            ChangeFlowRunState(state=crash, message="no heartbeat for 9 minutes; the next run resumes"),
        ),
        _watch(
            "dllm: mark as crashed what has not started",
            {f"{RUN}.Pending"}, {f"{RUN}.Running", *ENDS}, UNSTARTED,
            ChangeFlowRunState(state=crash, message="taken by a worker, but not started within 30 minutes"),
        ),
        _watch("dllm: report what waits for an hour", {f"{RUN}.Late"}, {f"{RUN}.Running", *ENDS}, QUEUED, report),
        _watch("dllm: report what runs for a day", {f"{RUN}.Running"}, ENDS, LONG, report),
        # One that is cancelled crashes on the way, for a moment.
        _watch("dllm: report what crashes", {f"{RUN}.Crashed"}, {f"{RUN}.Cancelled"}, CANCELLED, report),
        AutomationCore(
            name="dllm: report what fails",
            description="Failed flow runs.",
            trigger=EventTrigger(
                expect={f"{RUN}.Failed"}, match={"prefect.resource.id": f"{RUN}.*"},
                posture=Posture.Reactive, threshold=1,
            ),
            actions=[report],
        ),
    ]  # fmt: skip


def _watch(name: str, after: set[str], expect: set[str], within: timedelta, action: ActionTypes) -> AutomationCore:
    trigger = EventTrigger(
        match={"prefect.resource.id": f"{RUN}.*"},
        for_each={"prefect.resource.id"},
        after=after,
        expect=expect,
        posture=Posture.Proactive,
        threshold=1,
        within=within,
    )
    said = f"After {', '.join(sorted(after))} none of {', '.join(sorted(expect))} within {within}."
    return AutomationCore(name=name, description=said, trigger=trigger, actions=[action])


def on_new_responses(deployment_id: Any) -> AutomationCore:
    """Return what trains on new responses; off until somebody switches it on."""
    source = {"__prefect_kind": "jinja", "template": '[{"name": "{{ event.payload.folder }}"}]'}
    overrides = {
        "prepare.sources": {"__prefect_kind": "json", "value": source},
        "regenerate.engine": "dataset",
        "regenerate.turns": "last",
    }
    return AutomationCore(
        name="dllm: train on new responses",
        description="Runs pipeline/project on a checkout of HEAD with the folder that regenerate-parts has finished.",
        enabled=False,
        trigger=EventTrigger(expect={NEW_RESPONSES}, posture=Posture.Reactive, threshold=1),
        actions=[
            RunDeployment(
                source="selected",
                deployment_id=deployment_id,
                parameters={"checkout": "HEAD", "overrides": overrides},
            )
        ],
    )


def put(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Make an automation, or bring the one of its name up to date; whether it is on is its user's to say."""
    found = client.read_automations_by_name(automation.name)
    if not found:
        client.create_automation(automation)
    for known in found:
        wanted = automation.model_copy(update={"enabled": known.enabled})
        if AutomationCore(**known.model_dump()).model_dump() != wanted.model_dump():
            client.update_automation(known.id, wanted)


if __name__ == "__main__":
    main(sys.argv[1:])
