"""Configuration, tokenizer and processor files of a folder in the other Hugging Face format.

    github -> hf-native   config.json in transformers' words; tokenizer files as they are, with the names that the
                          processor asks for; processor files and chat template added; code of the folder left out
    hf-native -> github   config.json in the words of InternVLChatConfig; tokenizer files as they are; processor files
                          left out

A GitHub folder written from a native one names the release's classes and ships no code: this package reads it, and so
does transformers with the release's code beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_v2pe.checkpoint.files.weights_layout import LAYOUT_FILE
from megatron_v2pe.checkpoint.hf.sentencepiece_json import tokenizer_json
from megatron_v2pe.checkpoint.hf.weight_files import INDEX_FILE, side_files
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.arch.families import FAMILIES
from megatron_v2pe.config.arch.native import FolderFormat, github_config, native_config
from megatron_v2pe.config.trained_settings import DEFAULTS
from megatron_v2pe.data.text.templates import TEMPLATES
from megatron_v2pe.data.text.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, load_tokenizer
from megatron_v2pe.data.text.tokenizer_files import read_tokenizer_files

_PROCESSOR_FILES = (
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    "chat_template.jinja",
)
_REPLACED = ("config.json", "tokenizer_config.json", "generation_config.json", INDEX_FILE, LAYOUT_FILE)
_POSITIONS = ("rope_pos_id_version", "rope_pos_id_stride")
_TRAINED: dict[str, Any] = {
    **DEFAULTS,
    "system_message": "",
    "max_trained_tokens": 0,
}
"""How a run trained (`config.trained_settings`), and what a folder means that does not say; the rest travels."""
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_VIDEO_TOKEN = "<|video_pad|>"
_PARTS = (
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<IMG_CONTEXT>\\n' -}}"
    "{%- elif part['type'] == 'video' -%}{{- '<|video_pad|>\\n' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
)
CHAT_TEMPLATES = {
    "internvl2_5": (
        "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        + _PARTS
        + "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "internvl3_5_gpt_oss": (
        "{%- for message in messages -%}{{- '<|start|>' + message['role'] -}}"
        "{%- if message['role'] == 'assistant' -%}{{- '<|channel|>final' -}}{%- endif -%}{{- '<|message|>' -}}"
        + _PARTS
        + "{{- '<|return|>' if message['role'] == 'assistant' and loop.last else '<|end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"
    ),
}
"""The turns of a template; native folders have no system prompt unless a message brings one. Others have 2.5's."""


def files_of_other_format(folder: Path) -> tuple[FolderFormat, dict[str, bytes]]:
    """The side files of a folder, in the format that it does not have.

    Args:
        folder: a Hugging Face folder, or the `hf/` of a checkpoint.

    Returns:
        the other format; path in the folder -> contents.

    Raises:
        CheckpointError: the other format cannot hold the model.
    """
    arch = read_architecture(folder)
    is_github = arch.folder_format == "github"
    kept = {
        str(path): (folder / path).read_bytes()
        for path in side_files(folder)
        if str(path) not in (*_REPLACED, *_PROCESSOR_FILES) and path.suffix != ".py"
    }
    values = _read(folder / "config.json")
    positions = {key: values[key] for key in _POSITIONS if key in values}
    family_template = FAMILIES[arch.language.architecture].template
    trained = {
        key: values[key]
        for key, usual in {**_TRAINED, "template": family_template}.items()
        if values.get(key) is not None and values[key] != usual
    }
    tokenizer = _read(folder / "tokenizer_config.json")
    tokenizer.pop("auto_map", None)
    if is_github:
        image_token_id = load_tokenizer(folder).token_id(IMAGE_CONTEXT)
        config = native_config(values, str(folder / "config.json"), image_token_id=image_token_id)
        kept |= _processor_files(values, config)
        tokenizer, added = _native_tokenizer(folder, tokenizer)
        video_token = tokenizer["extra_special_tokens"]["video_token"]
        chat = CHAT_TEMPLATES.get(arch.template, CHAT_TEMPLATES["internvl2_5"])
        kept |= added | {"chat_template.jinja": chat.replace(_VIDEO_TOKEN, video_token).encode()}
    else:
        config = github_config(values, str(folder / "config.json"))
        tokenizer = _github_tokenizer(tokenizer)
    kept["config.json"] = _text({**config, **positions, **trained})
    kept["tokenizer_config.json"] = _text(tokenizer)
    generation = folder / "generation_config.json"
    if generation.is_file():
        kept["generation_config.json"] = _generation(generation, folder, arch=arch)
    return "hf-native" if is_github else "github", kept


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _text(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _processor_files(github: dict[str, Any], native: dict[str, Any]) -> dict[str, bytes]:
    """What InternVLProcessor reads; its class defaults are another model's (384 px, CLIP's mean)."""
    side = native["vision_config"]["image_size"][0]
    side = int(github.get("force_image_size") or side)
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        **_IMAGENET,
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
    images = {
        **common,
        "crop_to_patches": bool(github.get("dynamic_image_size", True)),
        "data_format": "channels_first",
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "max_patches": int(github.get("max_dynamic_patch", 12)),
        "min_patches": int(github.get("min_dynamic_patch", 1)),
    }
    videos = {**common, "initial_shift": True, "video_processor_type": "InternVLVideoProcessor"}
    processor = {"image_seq_length": native["image_seq_length"], "processor_class": "InternVLProcessor"}
    return {
        "preprocessor_config.json": _text(images),
        "video_preprocessor_config.json": _text(videos),
        "processor_config.json": _text(processor),
    }


def _native_tokenizer(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """tokenizer_config.json with the names that the processor asks for; a tokenizer.json where its class needs code."""
    known = load_tokenizer(folder).added_tokens
    names = {
        "start_image_token": IMAGE_START,
        "end_image_token": IMAGE_END,
        "context_image_token": IMAGE_CONTEXT,
        "video_token": _VIDEO_TOKEN if _VIDEO_TOKEN in known else _unused_token(folder),
    }
    config = {**config, "processor_class": "InternVLProcessor", "extra_special_tokens": names}
    config["return_token_type_ids"] = False
    if config.get("tokenizer_class") not in ("InternLM2Tokenizer", "InternLM3Tokenizer"):
        return config, {}
    added: dict[str, bytes] = {}
    if not (folder / "tokenizer.json").is_file():
        added["tokenizer.json"] = tokenizer_json(folder)
    original = config["tokenizer_class"]
    return {**config, "tokenizer_class": "PreTrainedTokenizerFast", "github_tokenizer_class": original}, added


def _unused_token(folder: Path) -> str:
    """A token that no text has, where a tokenizer has none for videos.

    The processor asks for one, replaces it wherever it is, and refuses texts that have it without a video.
    """
    files = read_tokenizer_files(folder)
    reserved = sorted(token for token in files.added if token.startswith("<|reserved_"))  # GPT-OSS
    return files.roles.get("unk_token") or next(iter(reserved), files.roles["eos_token"])


def _github_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    names = ("processor_class", "extra_special_tokens", "return_token_type_ids")
    kept = {key: value for key, value in config.items() if key not in names}
    original = kept.pop("github_tokenizer_class", None)
    return {**kept, "tokenizer_class": original} if original else kept


def _generation(path: Path, folder: Path, *, arch: InternVLArchitecture) -> bytes:
    """Answers end at the template's stop token; a GitHub folder leaves that to the template, a native one names it."""
    values = _read(path)
    if arch.folder_format == "github":
        template = TEMPLATES.get(arch.template, TEMPLATES["internvl2_5"])
        values["eos_token_id"] = load_tokenizer(folder).token_id(template.stop_token)
    return _text(values)
