"""The quickstart's checkpoint has the released layout and a tokenizer that this package reads."""

import json

from safetensors.numpy import load_file

from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.data.text.templates import get_template
from megatron_v2pe.data.text.tokenizer import load_tokenizer


def test_the_architecture_is_read(checkpoint):
    arch = read_architecture(checkpoint)
    assert arch.tokens_per_tile == 64
    assert arch.language.max_position_embeddings == 512
    assert arch.language.rope_scaling.kind == "dynamic"
    assert arch.position_mode == "default"


def test_weights_fit_the_configuration(checkpoint):
    from megatron_v2pe.checkpoint.convert.hf_source import open_hf

    open_hf(checkpoint)  # raises on a missing, surplus or misshapen tensor
    weights = load_file(checkpoint / "model.safetensors")
    assert 0.7e6 < sum(weight.size for weight in weights.values()) < 1.0e6
    assert {str(weight.dtype) for weight in weights.values()} == {"float32"}


def test_the_golden_checkpoint_has_the_same_keys_in_its_config(checkpoint, request):
    golden = sorted((request.config.rootpath / "tests" / "golden").rglob("a_internlm2_vit300m/config.json"))
    assert golden, "tests/golden holds a checkpoint of this family"
    ours, theirs = (json.loads(path.read_text()) for path in (checkpoint / "config.json", golden[0]))
    assert ours.keys() == theirs.keys()
    for section in ("llm_config", "vision_config"):
        assert ours[section].keys() == theirs[section].keys()


def test_the_tokenizer_has_internlm2s_structure(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    base = 1024
    assert [tokenizer.token_id(t) for t in ("<|plugin|>", "<|im_end|>", "<|im_start|>")] == [
        base,
        base + 4,
        base + 5,
    ]
    assert [tokenizer.token_id(t) for t in ("<img>", "</img>", "<IMG_CONTEXT>", "</box>")] == [
        base + 6,
        base + 7,
        base + 8,
        base + 14,
    ]
    assert tokenizer.vocab_size == base + 15 == read_architecture(checkpoint).language.vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


def test_the_chat_frame_and_the_digits_are_cheap(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    template = get_template("internlm2-chat")
    system = tokenizer.encode(template.system, add_bos=False)
    assert len(system) == 6  # <|im_start|> system \n, and the prompt in three pieces
    assert tokenizer.decode(system, skip_special_tokens=True).endswith(template.system[-20:])
    assert all(len(tokenizer.encode(str(digit), add_bos=False)) == 1 for digit in range(10))
    assert len(tokenizer.encode(template.assistant_role, add_bos=False)) == 3
    assert "<0x" not in "".join(tokenizer.tokenize("Which digit is marked? (a-z), 'x'; \"y\"."))


def test_the_seed_decides_the_weights_and_nothing_else(checkpoint, tmp_path):
    import make_checkpoint

    for seed in (0, 1):
        make_checkpoint.write_checkpoint(tmp_path / str(seed), seed=seed)
    for file in sorted(path.name for path in checkpoint.iterdir()):
        same, other = ((tmp_path / seed / file).read_bytes() for seed in ("0", "1"))
        assert same == (checkpoint / file).read_bytes()
        assert (other == same) is (file != "model.safetensors")


def test_small_tiles_are_there_for_the_other_examples(tmp_path):
    import make_checkpoint

    from megatron_v2pe.checkpoint.convert.hf_source import open_hf

    make_checkpoint.write_checkpoint(tmp_path / "hf", seed=0, tokens_per_tile=4)
    open_hf(tmp_path / "hf")
    arch = read_architecture(tmp_path / "hf")
    assert (arch.tokens_per_tile, arch.image_size) == (4, 56)
