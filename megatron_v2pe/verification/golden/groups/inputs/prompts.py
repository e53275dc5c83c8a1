"""Golden prompts: the pieces of the chat templates, and what transformers' processor makes of one image and a question.

text/templates.json      --data.text.templates.render-->  one string, answered or open
text/hf_processor.json   --tokenizer and tiling of ckpt_hf/<key>-->  ids, tiles; names of the processor's tokens
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_v2pe.checkpoint.convert.side_files import files_of_other_format
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.data.media.tiling import TilingRule, choose_grid
from megatron_v2pe.data.text.templates import TEMPLATES, ChatTemplate, Role, Turn, render
from megatron_v2pe.data.text.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, load_tokenizer
from megatron_v2pe.verification.golden.rows import Row, equal, unsupported


def template_rows(path: Path) -> Iterator[Row]:
    """Every template of text/templates.json."""
    for name, recorded in json.loads(path.read_text(encoding="utf-8")).items():
        if name not in TEMPLATES:
            yield unsupported(f"text/template_{name}", "all", reason=f"template {name!r} is not supported")
            continue
        template, system = TEMPLATES[name], recorded["system_message"]
        pieces = {
            "system": (template.system, recorded["system_template"].format(system_message=system)),
            "roles": ([template.user_role, template.assistant_role], recorded["roles"]),
            "separator": (template.separator, recorded["sep"]),
            "stop_token": (template.stop_token, recorded["stop_token"]),
            "system_sha256": (
                hashlib.sha256(template.system.removeprefix(template.system_role).encode()).hexdigest(),
                recorded["system_message_sha256"],
            ),
        }
        # The reference's template holds no header of answers: they bring their own.
        plain = replace(template, answer_header="")
        for is_open, wanted in ((True, recorded["rendered_open"]), (False, recorded["rendered_closed"])):
            turns = _turns(wanted, recorded, pieces["system"][1])
            text = render(plain, turns, add_generation_prompt=is_open).text
            pieces["rendered_open" if is_open else "rendered_closed"] = (text, wanted)
        for quantity, (ours, wanted) in pieces.items():
            yield _equal(f"text/template_{name}", quantity, ours, wanted)


def _turns(text: str, recorded: dict[str, Any], system: str) -> list[Turn]:
    """The messages inside a rendered prompt, read with the recorded pieces."""
    turns, rest = list[Turn](), text.removeprefix(system + recorded["sep"])
    speakers: tuple[Role, Role] = ("human", "gpt")
    while rest and rest not in recorded["roles"]:
        number = len(turns) % 2
        said = rest.removeprefix(recorded["roles"][number])
        value, _, rest = said.partition(recorded["sep"])
        value = value.removesuffix(recorded.get("sep2") or "")
        turns.append(Turn(role=speakers[number], value=value))
    return turns


def processor_rows(path: Path, native: Path, *, family: str | None) -> Iterator[Row]:
    """Every case of text/hf_processor.json.

    Args:
        path: the file.
        native: folder of native folders.
        family: prefix of the keys, None for all.
    """
    for number, case in enumerate(json.loads(path.read_text(encoding="utf-8"))["cases"]):
        name, folder = f"text/processor_{case['ckpt']}_{number}", native / case["ckpt"]
        if not case["ckpt"].startswith(family or ""):
            continue
        if not folder.is_dir():
            yield unsupported(name, "all", reason=f"the folder has no ckpt_hf/{case['ckpt']}")
            continue
        try:
            arch = read_architecture(folder)
            yield from _processor_rows(name, case, folder, arch)
        except CheckpointError as error:
            yield unsupported(name, "all", reason=str(error).splitlines()[0])


def _processor_rows(
    name: str, case: dict[str, Any], folder: Path, arch: InternVLArchitecture
) -> Iterator[Row]:
    tokenizer = load_tokenizer(folder)
    num_tiles = choose_grid(*case["image"], rule=_rule(folder)).num_tiles
    yield _equal(name, "num_tiles", num_tiles, case["num_tiles"])
    num_context = num_tiles * arch.tokens_per_tile
    yield _equal(name, "num_context_tokens", num_context, case["num_context_tokens"])
    image = IMAGE_START + IMAGE_CONTEXT * num_context + IMAGE_END
    ids = tokenizer.encode(case["rendered"].replace(IMAGE_CONTEXT, image))
    yield _equal(name, "input_ids", ids, case["input_ids"])
    if arch.template in TEMPLATES:
        yield _equal(name, "rendered", _rendered(TEMPLATES[arch.template], case), case["rendered"])
    github = folder.parents[1] / "ckpt" / case["ckpt"]
    if github.is_dir():
        ours = _attributes(github)
        ids_of = {
            f"{key}_id": tokenizer.token_id(token)
            for key, token in ours.items()
            if f"{key}_id" in case["attributes"]
        }
        # Where a tokenizer has no token for videos, the processor still asks for one, and ours names an unused one.
        wanted = {key: value for key, value in case["attributes"].items() if value != "absent"}
        yield _equal(name, "attributes", {key: (ours | ids_of).get(key) for key in wanted}, wanted)


def _rule(folder: Path) -> TilingRule:
    """The tiling that a native folder's processor files say."""
    own = folder / "preprocessor_config.json"
    if own.is_file():
        values = json.loads(own.read_text(encoding="utf-8"))
    else:
        both = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        values = both["image_processor"]
    return TilingRule(
        image_size=values["size"]["height"], min_tiles=values["min_patches"], max_tiles=values["max_patches"]
    )


def _rendered(template: ChatTemplate, case: dict[str, Any]) -> str:
    """The messages without a system text, each image as its placeholder and a newline."""
    speakers: dict[str, Role] = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = []
    for message in case["messages"]:
        parts = message["content"]
        texts = (f"{IMAGE_CONTEXT}\n" if part["type"] == "image" else part["text"] for part in parts)
        turns.append(Turn(role=speakers[message["role"]], value="".join(texts)))
    text = render(template, turns, add_generation_prompt=True).text
    return text.removeprefix(template.system + template.separator)


def _attributes(github: Path) -> dict[str, Any]:
    """Names of the processor's tokens in the tokenizer_config.json that a conversion of the folder writes."""
    _, files = files_of_other_format(github)
    return json.loads(files["tokenizer_config.json"])["extra_special_tokens"]


def _equal(name: str, quantity: str, ours: Any, wanted: Any) -> Row:
    return equal(name, quantity, is_equal=ours == wanted, detail=f"{ours!r}, expected {wanted!r}")
