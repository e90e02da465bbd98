"""Our language models as transformers' own: Auto classes, `generate`, `pipeline`, `Trainer`, PEFT.

    from mambakit.bridges.transformers import register, wrap

    register()                                     # AutoModelForCausalLM knows model_type "mambakit" now
    model = wrap(mambakit.load("some/checkpoint"))    # or AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder)

The network is a `LanguageModel`, unchanged, under the name `model`; the configuration holds its description.
`generate` carries our `State` in a `StateCache`, whose size does not grow with a recurrent model's text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.cache_utils import Cache
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        f"mambakit.bridges.transformers needs transformers 5.17 or newer ({error}): "
        "pip install 'mambakit[transformers]'"
    ) from error

from mambakit.config import to_dict
from mambakit.layers.mixer import Context, State
from mambakit.models.language import LanguageModel, LanguageModelConfig


class StateSpaceConfig(PreTrainedConfig):
    """A network's description as a configuration of transformers.

    Attributes:
        network: A `LanguageModelConfig` as plain data; without, the smallest of models.
        vocab_size: Tokens, from `network`.
        hidden_size: Width of the residual stream, from `network`.
        num_hidden_layers: Blocks, from `network`.
    """

    model_type = "mambakit"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, network: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.network = network or to_dict(LanguageModelConfig(vocab_size=2, d_model=64, pattern="M"))
        described = self.described()
        self.vocab_size, self.hidden_size = described.vocab_size, described.d_model
        self.num_hidden_layers = len(described.blocks)
        kwargs = {name: value for name, value in kwargs.items() if name not in vars(self)}
        super().__init__(**{"tie_word_embeddings": described.tie_embeddings, **kwargs})

    def described(self) -> LanguageModelConfig:
        """The network's description in our words."""
        return LanguageModelConfig.from_dict(self.network, where="network")


class StateCache(Cache):
    """Where a batch of sequences stands: our `State`, as `generate` hands it from step to step.

    Attributes:
        state: The state; `None` before the first token.
        seen: Tokens read so far, padding included.
        is_text: Whether every row's padding lies behind it.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: State | None = None
        self.seen = 0
        self.is_text = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.seen

    def reset(self) -> None:
        """Begin again with no token."""
        self.state, self.seen, self.is_text = None, 0, False

    def _select(self, rows: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows `(k,)` in this order, as a beam search chooses them."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows `(k,)`."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            rows = len(next(t for _, t in self.state.tensors() if t.dim()))
            self._select(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, *args: Any) -> None:
        """Refuse to forget the last tokens: a recurrent state cannot.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a state cannot be cropped; clone `cache.state` before what may be undone")


class StateSpaceForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of ours as a `PreTrainedModel`.

    Args:
        config: Its configuration.
    """

    config_class = StateSpaceConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _is_stateful = True  # no assisted decoding, which would crop a cache
    _tied_weights_keys = {"model.lm_head.weight": "model.embedding.weight"}  # noqa: RUF012
    _skip_keys_device_placement = ("past_key_values",)

    def __init__(self, config: StateSpaceConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.described())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The network has initialised itself."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.lm_head = new_embeddings

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward pass computes blocks again instead of remembering them."""
        return self.model.backbone.checkpoint_blocks

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.backbone.checkpoint_blocks = bool(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Score the next token after every position.

        Args:
            input_ids: Tokens `(b, l)`.
            attention_mask: 1 for text, 0 for padding `(b, tokens seen + l)`. Padding on the left is kept
                out exactly, as another document; on the right it may stand where nothing is continued.
            position_ids: Position of each token in its text `(b, l)`; counted by default.
            past_key_values: Where the sequences stand; overwritten.
            inputs_embeds: Embedded tokens `(b, l, d_model)` instead of `input_ids`.
            labels: Tokens to predict `(b, l)`, -100 for none; shifted by one inside.
            use_cache: Whether to return where the sequences stand; outside training by default.
            output_attentions: Only false.
            output_hidden_states: Only false.
            return_dict: Return an object instead of a tuple; true by default.
            logits_to_keep: Score only this many last positions, or positions by number; 0 scores all.
            seq_idx: Document number of each token `(b, l)`, instead of a mask.
            **kwargs: What the loss takes, such as `num_items_in_batch`.

        Returns:
            `loss` (with labels), `logits` `(b, l, v)` and `past_key_values`.

        Raises:
            ValueError: Neither or both of tokens and embedded ones, a mask with holes or with padding right
                of a text that is continued, or a mask and `seq_idx`.
            NotImplementedError: Attentions or hidden states, or another cache than ours.
        """
        for name, value in (
            ("output_attentions", output_attentions),
            ("output_hidden_states", output_hidden_states),
        ):
            if value:
                raise NotImplementedError(f"{name} is {value}, expected False: only logits are kept")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds: expected exactly one of them")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = past_key_values is not None or (not self.training and labels is None)
        cache = self._cache(past_key_values, given) if use_cache else None
        context = self._context(attention_mask, seq_idx, given.shape[1], cache)
        if position_ids is not None:
            context.positions = position_ids.expand(given.shape[:2])
        features = self._features(input_ids, inputs_embeds, None if cache is None else cache.state, context)
        if cache is not None:
            cache.seen += given.shape[1]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.lm_head(features[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = sum(context.losses, loss)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _features(
        self, tokens: Tensor | None, embedded: Tensor | None, state: State | None, context: Context
    ) -> Tensor:
        if embedded is None:
            return self.model.features(tokens, state, context)
        config = self.model.config
        return config.logits_scale * self.model.backbone(config.embedding_scale * embedded, state, context)

    def _cache(self, cache: Cache | None, given: Tensor) -> StateCache:
        """The cache to continue from, with a state for these rows."""
        cache = StateCache() if cache is None else cache
        if not isinstance(cache, StateCache):
            raise NotImplementedError(f"past_key_values is a {type(cache).__name__}, expected a StateCache")
        if cache.state is None:
            cache.state = self.model.init_state(len(given))
        return cache

    def _context(
        self, mask: Tensor | None, seq_idx: Tensor | None, length: int, cache: StateCache | None
    ) -> Context:
        """Padding as documents of their own, and positions that count the text alone."""
        if seq_idx is not None:
            if mask is not None and not bool(mask.all()):
                raise ValueError("seq_idx and attention_mask with padding: expected one of them")
            return Context(seq_idx=seq_idx)
        if mask is None or (cache is not None and cache.is_text and length == 1 and mask.dim() == 2):
            return Context() if mask is None else Context(positions=mask.sum(-1, keepdim=True) - 1)
        if mask.dim() != 2:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected (b, tokens)")
        text = mask.bool()
        begins = text[:, 1:] & ~text[:, :-1]
        if bool((begins.sum(-1) + text[:, 0] > 1).any()):
            raise ValueError("attention_mask has padding within a text, expected it on one side")
        if cache is not None:
            if bool((text[:, :-1] & ~text[:, 1:]).any()):
                raise ValueError("attention_mask has padding on the right of a text that is continued")
            if cache.seen and not cache.is_text and text.shape[1] > length:
                starting = begins[:, -length]  # the state of padding is no state
                cache.state.reset(starting.nonzero().squeeze(1))
            cache.is_text = bool(text[:, -1].all())
        if bool(text.all()):
            return Context()
        positions = (text.cumsum(-1) - 1).clamp(min=0)
        return Context(seq_idx=text[:, -length:].int(), positions=positions[:, -length:])

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give `generate` an empty cache of ours, unless it has one or wants none."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}, expected None: "
                "there is one cache, a StateCache"
            )
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = StateCache()


def register() -> None:
    """Tell transformers' `AutoConfig` and `AutoModelForCausalLM` about `model_type` "mambakit"."""
    AutoConfig.register(StateSpaceConfig.model_type, StateSpaceConfig, exist_ok=True)
    AutoModelForCausalLM.register(StateSpaceConfig, StateSpaceForCausalLM, exist_ok=True)


def wrap(model: LanguageModel, **settings: Any) -> StateSpaceForCausalLM:
    """Take a model as it is, sharing its parameters.

    Args:
        model: Any language model of ours.
        **settings: Of the configuration, such as `eos_token_id`, `bos_token_id`, `pad_token_id`; what a
            published model's own file said of them is taken by default.

    Returns:
        The same network as a `PreTrainedModel`.
    """
    published = model.published or {}
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    known = {name: published[name] for name in tokens if published.get(name) is not None}
    config = StateSpaceConfig(to_dict(model.config), **{**known, **settings})
    config.dtype = model.embedding.weight.dtype
    with torch.device("meta"):
        wrapped = StateSpaceForCausalLM(config)
    wrapped.model = model
    return wrapped.train(model.training)
