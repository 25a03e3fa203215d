"""A head that reconstructs masked patches of images, to train a trunk without labels (SimMIM, Xie et al. 2022).

Legend: `B` batch, `L` tokens, `C` hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedImageModelingOutput
from transformers.utils import can_return_tuple

from ...configuration.configuration_translution import TranslutionConfig
from .embeddings import join_patches, split_into_patches
from .input_checks import check_modality
from .modeling_translution import TranslutionModel, TranslutionPreTrainedModel


class TranslutionForMaskedImageModeling(TranslutionPreTrainedModel):
    """Replaces masked patches by a learned token, and reconstructs the pixels of every patch by a Linear on its hidden state.

    Transformers' `ViTForMaskedImageModeling` has a convolution of kernel size 1 and a `PixelShuffle` instead, which is a
    Linear for each patch too, but takes square patches alone; patches here may be oblong.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # The loss is a mean, whatever the Trainer counts: it has to divide by the number of batches it accumulates.
    accepts_loss_kwargs = False

    def __init__(self, config: TranslutionConfig):
        check_modality(self, config, "image")
        super().__init__(config)
        self.model = TranslutionModel(config, use_mask_token=True)
        patch_height, patch_width = config.patch_height_width
        self.decoder = nn.Linear(config.hidden_size, patch_height * patch_width * config.num_channels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> MaskedImageModelingOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, channels, height, width)`):
                Images of `image_size`, the masked patches included, whose pixels only the loss sees.
            bool_masked_pos (`torch.BoolTensor` of shape `(batch, patches)`):
                Which patches are masked, row by row; integers 0 and 1 are allowed too.
            attention_mask, interpolate_pos_encoding:
                See [`TranslutionModel.forward`].

        Returns:
            `MaskedImageModelingOutput` with `reconstruction` of shape `(batch, channels, height, width)`, and `loss`, the mean
            absolute error of the pixels of masked patches, in float32 at least; 0 where no patch is masked.

        Raises:
            ValueError: for no `bool_masked_pos`, or one of another shape or type, and as [`TranslutionModel.forward`].
        """
        if bool_masked_pos is None:
            raise ValueError(
                "`bool_masked_pos` must be booleans [batch, patches] that say which patches are masked, got None."
            )
        outputs = self.model(
            pixel_values=pixel_values,
            bool_masked_pos=bool_masked_pos,
            attention_mask=attention_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        patch_size = self.config.patch_height_width
        patches = self.decoder(outputs.last_hidden_state[:, 1:])
        # The sum of many pixels may be more than half precision holds.
        dtype = torch.promote_types(patches.dtype, torch.float32)
        targets = split_into_patches(pixel_values.to(patches.device, dtype), patch_size)
        masked = bool_masked_pos.to(patches.device, dtype)[..., None]
        errors = (patches.to(dtype) - targets).abs() * masked
        return MaskedImageModelingOutput(
            loss=errors.sum() / (masked.sum() * patches.shape[-1]).clamp(min=1),
            reconstruction=join_patches(patches, patch_size, tuple(pixel_values.shape[2:])),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["TranslutionForMaskedImageModeling"]
