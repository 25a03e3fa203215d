"""The trunk for images as a backbone of Transformers' models for segmentation, detection and depth.

Legend: `B` batch, `L` tokens, `C` hidden size, `H` and `W` height and width in patches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import can_return_tuple

from ...configuration.configuration_translution import TranslutionConfig
from .input_checks import check_modality
from .modeling_translution import TranslutionModel, TranslutionPreTrainedModel
from .trunks import final_norm_of


class TranslutionBackbone(BackboneMixin, TranslutionPreTrainedModel):
    """Feature maps `[B, C, H, W]` of the layers that `config.out_features` or `config.out_indices` name.

    The stage `"stem"` is what the first layer receives, `"stage1"` what it returns, and so on. Each map has passed the trunk's
    final LayerNorm, as in Transformers' DINOv2; the class token is left out.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: TranslutionConfig):
        check_modality(self, config, "image")
        # Names the last stage where nothing is named.
        config.set_output_features_output_indices(config.out_features, config.out_indices)
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.model = TranslutionModel(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs: Any,
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`):
                Images of any multiple of `patch_size`.
            attention_mask:
                See [`TranslutionModel.forward`].
            interpolate_pos_encoding (`bool`, *optional*, defaults to `True`):
                See [`TranslutionModel.forward`]. Models with a backbone cannot pass it on, and give it images of many sizes.

        Returns:
            `BackboneOutput` with `feature_maps`, a tuple of `(batch, hidden_size, height // patch height, width // patch width)`,
            in the order of `config.stage_names`.
        """
        outputs = self.model(
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        patches = zip(pixel_values.shape[2:], self.config.patch_height_width, strict=True)
        height, width = (side // patch for side, patch in patches)
        norm = self.model.norm if self.model.trunk is None else final_norm_of(self.model.trunk)
        maps = []
        for index, stage in enumerate(self.stage_names):
            if stage not in self.out_features:
                continue
            # Trunks differ in whether their last hidden state has passed the norm.
            last = index == self.config.num_hidden_layers
            tokens = outputs.last_hidden_state if last else norm(outputs.hidden_states[index])
            maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width)).contiguous())
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["TranslutionBackbone"]
