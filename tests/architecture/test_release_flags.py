"""Every flag of the release's training script has its answer on the page for its users, with a key that exists."""

import re
from pathlib import Path

import pytest

from megatron_v2pe.config.load import known_keys

PAGE = Path(__file__).parents[2] / "docs" / "from_v2pe_release.md"
FLAGS = (
    # model
    *("model_name_or_path", "vision_path", "llm_path", "mlp_path", "tokenizer_path"),
    *("freeze_llm", "freeze_backbone", "freeze_mlp", "unfreeze_vit_layers", "unfreeze_lm_head"),
    *("use_backbone_lora", "use_llm_lora", "vision_select_layer", "use_custom_trainer", "grad_checkpoint"),
    *("drop_path_rate", "ps_version", "compress_seq", "chunk_num", "interaction", "fuse_method"),
    *("compress_method", "attn_type", "img_emb_down_sample_ratio"),
    # data
    *("max_seq_length", "force_image_size", "down_sample_ratio", "pad2square", "conv_style", "meta_path"),
    *("use_data_resampling", "dynamic_image_size", "dynamic_max_patch", "use_thumbnail"),
    *("min_dynamic_patch", "max_dynamic_patch", "min_num_frame", "max_num_frame", "neftune_alpha"),
    *("normalize_type", "use_packed_ds", "num_images_expected", "max_packed_tokens", "max_buffer_size"),
    *("log_freq", "strict_mode", "replacement", "allow_overflow", "loss_reduction"),
    *("loss_reduction_all_gather", "scale", "final_size", "rope_pos_id_version", "rope_pos_id_stride"),
    # what its recipes and their copies give Hugging Face's trainer
    *("output_dir", "overwrite_output_dir", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "evaluation_strategy", "save_strategy", "save_steps"),
    *("save_total_limit", "learning_rate", "weight_decay", "warmup_ratio", "warmup_steps"),
    *("lr_scheduler_type", "logging_steps", "max_steps", "do_train", "group_by_length", "deepspeed"),
    *("report_to", "run_name", "remove_unused_columns", "bf16", "fp16", "seed", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim", "gradient_checkpointing"),
    *("dataloader_num_workers", "resume_from_checkpoint", "ddp_timeout"),
)


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_has_an_answer(flag):
    assert re.search(rf"--{flag}\b", PAGE.read_text(encoding="utf-8")), flag


def test_keys_that_are_named_exist():
    sections = {key.split(".")[0] for key in known_keys()}
    named = set(re.findall(r"`([a-z]+)\.([a-z_0-9]+)", PAGE.read_text(encoding="utf-8")))
    keys = {f"{section}.{name}" for section, name in named if section in sections}
    assert len(keys) >= 40
    assert keys - set(known_keys()) == set()
