"""lmms-eval's tasks with the prompts and lengths of the V2PE release, as YAML files that override the stock ones."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class TaskOverride:
    """A stock task asked as the release asks.

    Attributes:
        name: of the override.
        stock: file of the stock task, below lmms-eval's folder of tasks.
        suffix: what follows the question.
        max_new_tokens: longest answer.
    """

    name: str
    stock: str
    suffix: str
    max_new_tokens: int


_PHRASE = " Answer the question using a single word or phrase."
_LETTER = "\nAnswer with the option's letter from the given choices directly."
OVERRIDES = (
    TaskOverride(name="v2pe_chartqa", stock="chartqa/chartqa.yaml", suffix=_PHRASE, max_new_tokens=100),
    TaskOverride(name="v2pe_docvqa_val", stock="docvqa/docvqa_val.yaml", suffix=_PHRASE, max_new_tokens=100),
    TaskOverride(
        name="v2pe_infovqa_val", stock="infovqa/infovqa_val.yaml", suffix=_PHRASE, max_new_tokens=100
    ),
    TaskOverride(name="v2pe_pope", stock="pope/pope.yaml", suffix=" ", max_new_tokens=100),
    TaskOverride(
        name="v2pe_scienceqa_img", stock="scienceqa/scienceqa_img.yaml", suffix=_LETTER, max_new_tokens=100
    ),
)


def write_tasks(folder: Path) -> list[Path]:
    """Write one YAML file an override; `--include_path FOLDER` makes lmms-eval find them.

    Raises:
        ConfigError: lmms-eval is not installed, or has no such task.
    """
    spec = find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise ConfigError("lmms-eval is not installed; run  pip install 'megatron_v2pe[lmms]'")
    stock = Path(spec.origin).parent / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task in OVERRIDES:
        if not (stock / task.stock).exists():
            raise ConfigError(f"this lmms-eval has no task {task.stock}; version 0.7.3 has")
        path = folder / f"{task.name}.yaml"
        write_atomic(path, _yaml(task, stock / task.stock))
        written.append(path)
    return written


def _yaml(task: TaskOverride, stock: Path) -> str:
    suffix = task.suffix.replace("\n", "\\n")
    return "\n".join(
        [
            f"include: {stock}",
            f"task: {task.name}",
            "generation_kwargs:",
            f"  max_new_tokens: {task.max_new_tokens}",
            "  temperature: 0",
            "  do_sample: false",
            "lmms_eval_specific_kwargs:",
            "  default:",
            "    format: default",
            '    pre_prompt: ""',
            f'    post_prompt: "{suffix}"',
            "",
        ]
    )
