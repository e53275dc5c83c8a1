"""An export with code beside the weights, loaded by transformers alone: the same answers as ours."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_v2pe.checkpoint import remote_code
from megatron_v2pe.checkpoint.convert import remote_code as convert
from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import hf_path
from megatron_v2pe.cli.main import main
from megatron_v2pe.config.arch.families import FAMILIES as FAMILIES_BY_ARCHITECTURE
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.data.text.tokenizer import load_tokenizer
from tests.support.hf_folders import edit_config, folder_bytes, golden_copy
from tests.support.prompts import load_engine, random_prompt

FAMILIES = ("a_internlm2_vit300m", "c_qwen2_vit300m", "d_llama_vit6b", "e_phi3_vit300m")
LATER = (
    "h_qwen3_vit300m",
    "i_qwen3_vit6b",
    "j_qwen3moe_vit300m",
    "internlm3",
    "n_internlm2_vit300m",
)
GOLDEN_FAMILIES = Path(__file__).parents[2] / "golden_families" / "ckpt"
TOLERANCE = 1e-4  # float32, as for the golden logits


def exported(tmp_path, key, **positions):
    """Checkpoint and exported folder of a golden family with other position keys."""
    source = tmp_path / "source"
    if key == "internlm3":  # a llama by another name, with a head size of its own
        golden_copy(source, key="d_llama_vit6b")
        config = json.loads((source / "config.json").read_text())
        llm = config["llm_config"] | {
            "architectures": ["InternLM3ForCausalLM"],
            "bias": False,
            "qkv_bias": False,
        }
        llm["head_dim"] = llm["hidden_size"] // llm["num_attention_heads"]
        edit_config(source, llm_config=llm)
    elif key in FAMILIES:
        golden_copy(source, key=key)
    else:
        shutil.copytree(GOLDEN_FAMILIES / key, source, copy_function=shutil.copyfile)
    if positions:
        edit_config(source, **positions)
    import_hf(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "exported", remote_code=True)
    return tmp_path / "checkpoint", tmp_path / "exported"


def load(folder):
    transformers = pytest.importorskip("transformers", reason="extra 'verify' is not installed")
    model = transformers.AutoModel.from_pretrained(str(folder), trust_remote_code=True)
    return model.float().eval()


class OurTokenizer:
    """Ours, as `chat` asks a tokenizer; transformers has no InternLM2 tokenizer without code of the checkpoint."""

    def __init__(self, folder):
        self._tokenizer = load_tokenizer(folder)

    def __call__(self, text):
        return {"input_ids": self._tokenizer.encode(text)}

    def convert_tokens_to_ids(self, token):
        return self._tokenizer.token_id(token)

    def decode(self, ids, skip_special_tokens=False):
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("key", FAMILIES + LATER)
@pytest.mark.parametrize("stride", [None, 1])
def test_the_same_greedy_tokens_and_logits(tmp_path, key, stride):
    positions = {"rope_pos_id_version": "v2pe_fix", "rope_pos_id_stride": stride} if stride else {}
    checkpoint, folder = exported(tmp_path, key, **positions)
    model = load(folder)
    engine = load_engine(checkpoint, mode="v2pe_fixed" if stride else "default")
    whole = engine.arch.tokens_per_tile
    prompt = random_prompt(engine.arch, [9, ("image", 2), 5, ("image", 1), 40], stride=stride or whole)
    steps = list(engine.stream(prompt, max_new_tokens=8, logits=True))
    model.img_context_token_id = 0  # random_prompt's visual tokens
    pixels = torch.from_numpy(prompt.tiles.load(0, 3))
    ids = torch.from_numpy(prompt.tokens)[None]
    found = model.generate(pixels, ids, max_new_tokens=8)
    assert found[0].tolist() == [step.token for step in steps]
    with torch.no_grad():
        logits = model(ids, pixels).logits[0, -1]
    assert float((logits - steps[0].logits).abs().max()) < TOLERANCE


def test_prompts_of_different_lengths_together_and_chunks_change_nothing(tmp_path):
    _, folder = exported(tmp_path, FAMILIES[0], rope_pos_id_version="v2pe_fix", rope_pos_id_stride=2)
    model = load(folder)
    model.img_context_token_id = 0
    arch = load_engine(tmp_path / "checkpoint").arch
    prompts = [
        random_prompt(arch, pieces, seed=n) for n, pieces in enumerate(([5, ("image", 1), 3], [60], [30]))
    ]
    alone = []
    for prompt in prompts:
        count = prompt.layout.total_tiles
        pixels = torch.from_numpy(prompt.tiles.load(0, count)) if count else None
        alone.append(
            model.generate(pixels, torch.from_numpy(prompt.tokens)[None], max_new_tokens=6)[0].tolist()
        )
    longest = max(len(prompt.tokens) for prompt in prompts)
    ids = torch.zeros(3, longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.tokens) :] = torch.from_numpy(prompt.tokens)
        mask[row, longest - len(prompt.tokens) :] = 1
    ids[mask == 0] = 7
    pixels = torch.from_numpy(prompts[0].tiles.load(0, 1))
    assert model.generate(pixels, ids, mask, max_new_tokens=6).tolist() == alone
    import sys

    module = sys.modules[type(model).__module__]
    before, module.CHUNK_TOKENS = module.CHUNK_TOKENS, 7
    assert model.generate(pixels, ids, mask, max_new_tokens=6).tolist() == alone
    module.CHUNK_TOKENS = before


def test_chat_batch_history_and_streaming(tmp_path):
    checkpoint, folder = exported(tmp_path, FAMILIES[1], rope_pos_id_version="v2pe_fix", rope_pos_id_stride=1)
    model, tokenizer = load(folder), OurTokenizer(folder)
    from megatron_v2pe.inference.chat import Chat, ChatOptions
    from megatron_v2pe.inference.prompts.messages import Message
    from megatron_v2pe.inference.prompts.prompt import Prompt
    from megatron_v2pe.inference.sampling import Sampling

    chat = Chat(checkpoint, ChatOptions(dtype="float32"))
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    import PIL.Image

    PIL.Image.fromarray(np.zeros((56, 112, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    asked = chat.prompt(
        [Message(role="human", text="<image>\nWhat is it?", images=(str(tmp_path / "a.png"),))]
    )
    assert asked.layout.num_tiles.tolist() == [3]
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    from megatron_v2pe.inference.prompts.tiles import ArrayTiles

    prompt = Prompt(tokens=asked.tokens, layout=asked.layout, tiles=ArrayTiles(pixels.numpy(), [3]))
    tokens = chat.engine.generate(prompt, sampling=Sampling(max_new_tokens=8), stop_ids=chat.stop_ids)
    wanted = chat.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    how = {"max_new_tokens": 8}
    answer, history = model.chat(tokenizer, pixels, "What is it?", how, return_history=True)
    assert answer == wanted
    assert history == [("<image>\nWhat is it?", wanted)]
    further = model.chat(tokenizer, pixels, "And?", how, history=history, num_patches_list=[3])
    assert isinstance(further, str)
    both = model.batch_chat(tokenizer, torch.cat([pixels, pixels[:1]]), ["What is it?", "Who?"], how, [3, 1])
    assert both[0] == wanted

    class Streamer:
        def __init__(self):
            self.tokens, self.is_ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.is_ended = True

    streamer = Streamer()
    model.chat(tokenizer, pixels, "What is it?", {**how, "streamer": streamer})
    assert streamer.tokens[: len(tokens)] == tokens
    assert streamer.is_ended
    drawn = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(0)
    assert isinstance(model.chat(tokenizer, pixels, "What is it?", drawn), str)
    for bad, message in (
        ({"num_beams": 2}, "num_beams"),
        ({"typical_p": 1}, "typical_p"),
        ({"max_new_tokens": 0}, "0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.chat(tokenizer, pixels, "What is it?", {**how, **bad})
    with pytest.raises(ValueError, match=r"1\.\.4"):
        model.chat(tokenizer, pixels, "What is it?", how, rope_pos_id_stride=9)


def test_random_strides_need_one_and_a_recommended_one_is_used(tmp_path):
    _, folder = exported(tmp_path, FAMILIES[0], rope_pos_id_version="v2pe_rnd")
    model = load(folder)
    with pytest.raises(ValueError, match="random strides"):
        model.stride_of()
    export_hf(tmp_path / "checkpoint", tmp_path / "recommended", remote_code=True, stride=4)
    assert load(tmp_path / "recommended").stride_of() == (4, True)
    assert load(tmp_path / "recommended").stride_of("default") == (16, True)


def test_only_config_and_code_are_added(tmp_path):
    checkpoint, folder = exported(tmp_path, FAMILIES[0])
    before, after = folder_bytes(tmp_path / "source"), folder_bytes(folder)
    added = {"configuration_internvl_v2pe.py", "modeling_internvl_v2pe.py"}
    assert set(after) == set(before) | added
    assert {name for name in before if before[name] != after[name]} == {"config.json"}
    old, new = (json.loads(files["config.json"]) for files in (before, after))
    assert set(new) - set(old) <= {"auto_map", "chat_format"}
    assert new["auto_map"]["AutoModel"] == "modeling_internvl_v2pe.InternVLV2PEModel"
    assert new["llm_config"] == old["llm_config"]
    export_hf(checkpoint, tmp_path / "plain")
    assert folder_bytes(tmp_path / "plain") == before


@pytest.mark.parametrize(
    ("positions", "stride", "message"),
    [
        ({"rope_pos_id_version": "v2pe_rnd"}, 17, r"1\.\.16"),
        ({"rope_pos_id_version": "v2pe_fix", "rope_pos_id_stride": 4}, 2, "v2pe_fixed positions of stride 4"),
        ({}, 4, "default positions"),
    ],
)
def test_a_stride_that_was_not_trained_is_refused(tmp_path, positions, stride, message):
    source = golden_copy(tmp_path / "source")
    edit_config(source, **positions)
    import_hf(source, tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match=message):
        export_hf(tmp_path / "checkpoint", tmp_path / "exported", stride=stride)
    assert not (tmp_path / "exported").exists()


def test_the_verb(tmp_path, capsys):
    source = golden_copy(tmp_path / "source")
    edit_config(source, rope_pos_id_version="v2pe_rnd")
    import_hf(source, tmp_path / "checkpoint")
    verb = ["export-hf", str(tmp_path / "checkpoint"), str(tmp_path / "exported")]
    assert main([*verb, "--remote-code", "--adapter"]) == 2
    assert "--remote-code" in capsys.readouterr().err
    assert main([*verb, "--remote-code", "--stride", "2"]) == 0
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["rope_pos_id_stride"] == 2
    import_hf(tmp_path / "exported", tmp_path / "again")  # its own code beside the weights does no harm
    assert (hf_path(tmp_path / "again") / "modeling_internvl_v2pe.py").is_file()


def test_a_family_that_the_code_does_not_know_is_refused(tmp_path, capsys, monkeypatch):
    import_hf(GOLDEN_FAMILIES / "j_qwen3moe_vit300m", tmp_path / "checkpoint")
    known = tuple(name for name in convert.ARCHITECTURES if "Moe" not in name)
    monkeypatch.setattr(convert, "ARCHITECTURES", known)
    verb = ["export-hf", str(tmp_path / "checkpoint"), str(tmp_path / "exported"), "--remote-code"]
    assert main(verb) == 2
    assert "--remote-code knows" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_the_verb_knows_the_families_of_the_code_and_of_this_package():
    tree = ast.parse((Path(remote_code.__file__).parent / "modeling_internvl_v2pe.py").read_text())
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FAMILIES"
    )
    assert tuple(ast.literal_eval(table)) == convert.ARCHITECTURES
    assert set(convert.ARCHITECTURES) <= set(FAMILIES_BY_ARCHITECTURE)
