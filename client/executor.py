"""Starts the ClientApp's process for every message of one SuperNode, and no other program of Flower's.

It is run as ``flower-superexec`` is, with the same options. Differences: of the tasks that a run can make, those of a
ClientApp alone are taken; the process that is started runs this node's own app (``own_app.py``); and the token of a
task is handed over in a file, as every user of the host can read a command line.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile

from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

from client.supernode import log_with_times
from conf import CHECKOUT


class OwnAppExecutor(SubprocessExecutor):
    """Flower's own for local processes, narrowed to the node's own app."""

    def get_eligible_capacity(
        self, supported_task_types: set[TaskType], **options: object
    ) -> tuple[set[TaskType], set[str]]:
        """Tasks of a ClientApp alone are asked for."""
        return {TaskType.CLIENT_APP} & supported_task_types, set()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Starts the process of one message."""
        if spec.task_type != TaskType.CLIENT_APP:
            return LaunchResult.failed(f"a node runs no {spec.task_type}")
        handle, token = tempfile.mkstemp(prefix="cg-fedllm-task-")  # its owner's alone
        with os.fdopen(handle, "w") as file:
            file.write(spec.token)
        command = [sys.executable, "-m", "client.own_app", "--runtime-api-address", spec.runtime_api_address]
        command += ["--token-file", token, "--parent-pid", str(spec.parent_pid or os.getpid())]
        subprocess.Popen(command, cwd=CHECKOUT)
        return LaunchResult.accepted()


def main() -> None:
    log_with_times()
    runtime = importlib.import_module("flwr.supercore.superexec.run_superexec")
    assert hasattr(runtime, "get_executor"), "another release of Flower: it would run any app"
    setattr(runtime, "get_executor", lambda *_, **__: OwnAppExecutor())  # noqa: B010
    importlib.import_module("flwr.supercore.cli.flower_superexec").flower_superexec()


if __name__ == "__main__":
    main()
