"""The text side of a served model, ready to use: tokenizer, chat template, sampling defaults."""

from dataclasses import dataclass

from jserve.checkpoints.text_assets import TextAssets
from jserve.gateway.chat import ChatTemplate
from jserve.gateway.config import GatewayConfig
from jserve.gateway.defaults import SamplingDefaults, sampling_defaults
from jserve.gateway.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class TextModel:
    """Parts of a model's files that a `RequestPlane` needs."""

    tokenizer: TextTokenizer
    chat_template: ChatTemplate | None  # None: the model has none
    defaults: SamplingDefaults

    @classmethod
    def from_assets(cls, assets: TextAssets, config: GatewayConfig) -> "TextModel":
        """Reads a model's files; the config's defaults come before the model's own.

        Raises ConfigError if tokenizer, template or generation config is wrong.
        """
        template = assets.chat_template
        return cls(
            tokenizer=TextTokenizer(
                assets.tokenizer_json, bos_token_id=assets.bos_token_id, add_bos=assets.add_bos
            ),
            chat_template=None
            if template is None
            else ChatTemplate(template, special_tokens=assets.special_tokens),
            defaults=sampling_defaults(assets.generation_config, config),
        )
