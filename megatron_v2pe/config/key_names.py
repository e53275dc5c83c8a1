"""Names that other programs give to fields of a run, so that a wrong key leads to the right one."""

from __future__ import annotations

from collections.abc import Mapping

_OTHER_NAMES = {
    "optim.lr": "learning_rate base_lr max_lr",
    "optim.min_lr": "lr_min minimum_lr",
    "optim.steps": "max_steps num_steps train_steps total_steps max_iters train_iters iterations num_iterations",
    "optim.global_batch_size": "batch_size train_batch_size total_batch_size per_device_train_batch_size "
    "micro_batch_size gradient_accumulation_steps",
    "optim.warmup_steps": "warmup warmup_ratio warmup_iters lr_warmup_steps num_warmup_steps lr_warmup_iters",
    "optim.weight_decay": "wd decay_rate",
    "optim.clip_grad": "max_grad_norm grad_clip gradient_clipping gradient_clip_val clip_grad_norm",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_epsilon adam_eps epsilon",
    "checkpoint.save_every": "save_steps save_interval checkpoint_interval save_freq save_frequency",
    "checkpoint.save_minutes": "save_interval_minutes every_n_minutes train_time_interval",
    "checkpoint.keep": "save_total_limit keep_last max_checkpoints num_checkpoints",
    "checkpoint.resume": "resume_from_checkpoint",
    "runtime.run_dir": "output_dir out_dir work_dir save_dir log_dir output exp_dir",
    "runtime.log_every": "logging_steps log_interval log_steps",
    "runtime.dtype": "bf16 fp16 precision torch_dtype mixed_precision params_dtype",
    "runtime.seed": "random_seed data_seed",
    "runtime.tensorboard": "report_to",
    "runtime.wandb_project": "wandb project",
    "data.meta": "meta_path data_path dataset train_data train_file annotation annotations data_meta",
    "data.template": "conv_style chat_template conversation_template",
    "data.max_pack_tokens": "max_packed_tokens max_seq_length seq_length max_length sequence_length seq_len",
    "data.max_sample_tokens": "max_sample_length",
    "data.num_workers": "dataloader_num_workers workers",
    "data.max_dynamic_patch": "max_num_tiles max_tiles max_num",
    "model.checkpoint": "load pretrained init_from init_checkpoint load_checkpoint",
    "model.hf_path": "model_name_or_path pretrained_model_name_or_path model_path hf_folder hf_model",
    "model.recompute": "gradient_checkpointing grad_checkpoint activation_checkpointing recompute_granularity",
    "model.freeze_language": "freeze_llm freeze_language_model",
    "model.freeze_projector": "freeze_mlp freeze_mlp1",
    "vision.freeze": "freeze_backbone freeze_vision freeze_vit freeze_vision_tower",
    "vision.drop_path_rate": "drop_path",
    "lora.language_rank": "use_llm_lora lora_rank lora_r rank r",
    "lora.vision_rank": "use_backbone_lora",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "parallel.tp": "tensor_parallel_size tensor_model_parallel_size tensor_parallel",
    "parallel.pp": "pipeline_parallel_size pipeline_model_parallel_size pipeline_parallel",
    "parallel.cp": "context_parallel_size context_parallel chunk_num ring_size sequence_parallel_size",
    "position.mode": "rope_pos_id_version position_mode v2pe",
    "position.stride": "rope_pos_id_stride",
}
SYNONYMS: Mapping[str, str] = {other: key for key, names in _OTHER_NAMES.items() for other in names.split()}
"""Name in another program -> `section.key` of ours."""
