"""lmms-eval in process with a model of several ranks: rank 0 runs the harness, the others wait for its questions.

rank 0   evaluate(lm) -> question --broadcast--> answer        rank 1, 2, ...   --broadcast--> answer, until None
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_v2pe.core.env import forget_launcher
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.evaluation.benchmarks.base import Request, Response
from megatron_v2pe.evaluation.jobs.engine_adapter import ModelAnswerer
from megatron_v2pe.evaluation.lmms.tasks import write_tasks
from megatron_v2pe.evaluation.retrieval.questions import StrideSetting


def judge(
    tasks: Sequence[str],
    answerer: ModelAnswerer,
    setting: StrideSetting,
    *,
    rank: int,
    include: Sequence[Path],
    limit: int,
    own_tasks: Path,
) -> dict[str, Any] | None:
    """Run tasks; every rank of the one replica calls this.

    Args:
        tasks: names, stock or of `tasks.py`.
        answerer: the model.
        setting: stride.
        rank: this process; 0 runs the harness.
        include: folders with further task files.
        limit: first documents of each task; 0 is all.
        own_tasks: folder for the task files of this package.

    Returns:
        Results by task on rank 0, None elsewhere.

    Raises:
        ConfigError: more than one replica, lmms-eval is missing, or it has no such task.
    """
    share = answerer.prepare(setting)
    if share.count > 1:
        raise ConfigError(
            f"the processes make {share.count} replicas of the model, but lmms-eval in process drives one; raise --tp, "
            "--pp or --cp, or record its questions and share them with  evaluate --benchmark lmms"
        )
    if rank == 0:
        try:
            return _run_harness(
                tasks, lambda request: _together(request, answerer, setting), include, limit, own_tasks
            )
        finally:
            answerer.shared(None)
    while (request := answerer.shared(None)) is not None:
        answerer.answer(request, setting)
    return None


def _together(request: Request, answerer: ModelAnswerer, setting: StrideSetting) -> Response:
    answerer.shared(request)
    return answerer.answer(request, setting)


def _run_harness(
    tasks: Sequence[str],
    answer: Callable[[Request], Response],
    include: Sequence[Path],
    limit: int,
    own_tasks: Path,
) -> dict[str, Any]:
    write_tasks(own_tasks)
    forget_launcher()  # which the harness would shard documents by
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager, get_task_dict

    from megatron_v2pe.evaluation.lmms.model import HarnessModel

    manager = TaskManager(include_path=[str(path) for path in (own_tasks, *include)])
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"--tasks: lmms-eval has no task {unknown[0]!r}")
    model = HarnessModel(answer=answer)
    found = get_task_dict(list(tasks), manager, "chat")
    model.task_dict = {name: task.dataset for name, task in found.items()}
    results = evaluator.evaluate(
        model,
        found,
        limit=limit or None,
        bootstrap_iters=0,
        log_samples=False,
        distributed_executor_backend="torchrun",
    )
    return dict(results["results"])
