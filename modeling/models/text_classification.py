"""Heads that classify texts, or each of their tokens.

Legend: `B` batch, `L` tokens, `C` hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.utils import can_return_tuple

from ...configuration.configuration_translution import TranslutionConfig
from .input_checks import check_class_labels, check_modality, check_token_labels
from .modeling_translution import TranslutionModel, TranslutionPreTrainedModel


class TranslutionTextClassifier(TranslutionPreTrainedModel):
    """A trunk, and a Linear from hidden states to logits, named as in Transformers' generic classes.

    Those classes make the trunk by `AutoModel`, which asks for permission to run code that a checkpoint brought.
    """

    # The loss is a mean, whatever the Trainer counts: it has to divide by the number of batches it accumulates.
    accepts_loss_kwargs = False

    def __init__(self, config: TranslutionConfig, bias: bool):
        check_modality(self, config, "text")
        if config.num_labels < 1:
            raise ValueError(f"{type(self).__name__} needs `num_labels` of at least 1, got {config.num_labels}.")
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TranslutionModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=bias)


class TranslutionForSequenceClassification(TranslutionTextClassifier):
    """Text classifier: a Linear head without bias on the last token of a text that is not padding.

    Transformers' `GenericForSequenceClassification` looks for that token by `pad_token_id`, of which `inputs_embeds` have none
    and which may also end a text; here `attention_mask` says which tokens are padding.
    """

    def __init__(self, config: TranslutionConfig):
        super().__init__(config, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        r"""
        Args:
            input_ids, position_ids, inputs_embeds:
                See [`TranslutionModel.forward`].
            attention_mask (`torch.Tensor`, *optional*):
                See [`TranslutionModel.forward`]. A mask `(batch, tokens)` says which token of a text is its last one, whether
                padding is on its left or on its right. Without such a mask it is the last of `input_ids` that is not
                `config.pad_token_id`, and the last of `inputs_embeds`.
            labels (`torch.Tensor`, *optional*):
                Class indices `(batch,)`; floats `(batch,)` where `num_labels` is 1 (regression) or `(batch, num_labels)` for
                several labels at once, see `config.problem_type`.

        Returns:
            `SequenceClassifierOutputWithPast` with `logits` of shape `(batch, num_labels)`.

        Raises:
            ValueError: for several texts of which nothing says where they end, and as [`TranslutionModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        tokens = outputs.last_hidden_state
        check_class_labels(labels, self.config, tokens.shape[0])
        texts = torch.arange(tokens.shape[0], device=tokens.device)
        logits = self.score(tokens[texts, self._last_tokens(tokens, input_ids, attention_mask)])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_tokens(self, tokens: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | int:
        """The index of each text's last token, int64 `[B]`, or one index for all of `[B, L, C]` tokens."""
        (batch, length), padding = tokens.shape[:2], self.config.pad_token_id
        if attention_mask is not None and attention_mask.ndim == 2:
            # With a cache the mask is that of the tokens in it as well.
            real = attention_mask[:, -length:] != 0
        elif input_ids is not None and padding is not None:
            real = input_ids != padding
        elif input_ids is None or batch <= 1:
            return -1
        else:
            raise ValueError(
                "`attention_mask` must be [batch, tokens], or `pad_token_id` of the config an integer, to tell which tokens of "
                f"{batch} texts are padding; got neither."
            )
        return (torch.arange(length, device=tokens.device) * real.to(tokens.device)).argmax(dim=-1)


class TranslutionForTokenClassification(GenericForTokenClassification, TranslutionTextClassifier):
    """Classifier of tokens: dropout (`config.classifier_dropout`), then a Linear head with bias on every token."""

    def __init__(self, config: TranslutionConfig):
        TranslutionTextClassifier.__init__(self, config, bias=True)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        r"""
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds:
                See [`TranslutionModel.forward`]. Text is causal: a token is classified by those before it and itself.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                The class of each token; -100, for padding, is ignored.

        Returns:
            `TokenClassifierOutput` with `logits` of shape `(batch, length, num_labels)`.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is not None:
            check_token_labels(labels, tokens, self.config.num_labels, "`num_labels`")
        # The output has no place for a cache.
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )


__all__ = ["TranslutionForSequenceClassification", "TranslutionForTokenClassification", "TranslutionTextClassifier"]
