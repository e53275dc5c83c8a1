"""Configuration of InternVL with fractional visual positions (V2PE); written by megatron_v2pe's export-hf."""

from typing import Any

from transformers import PretrainedConfig


class InternVLV2PEConfig(PretrainedConfig):
    """config.json as it is: `vision_config`, `llm_config`, tiling, template and positions.

    Attributes:
        rope_pos_id_version: `v2pe_fix`, `v2pe_rnd` or `default`.
        rope_pos_id_stride: stride that was trained, or is recommended where strides were random; null is none.
        chat_format: text around messages: system, user_role, assistant_role, separator, strip_values.
    """

    model_type = "internvl_chat"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        rope_pos_id_version: str = "default",
        rope_pos_id_stride: int | None = None,
        chat_format: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vision_config = dict(vision_config or {})
        self.llm_config = dict(llm_config or {})
        self.rope_pos_id_version = rope_pos_id_version
        self.rope_pos_id_stride = rope_pos_id_stride
        self.chat_format = dict(chat_format or {})
        kwargs["tie_word_embeddings"] = False  # a tied head has no tensor of its own, see LanguageModel
        super().__init__(**kwargs)
