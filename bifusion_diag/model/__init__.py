"""The model: encoders, pooling, decoder, losses, and what they return.

Nothing is imported here: who needs only the sparse engine or the outputs does not wait for open_clip.

=====================  ================================================================================
``build``              :func:`build_model`, from settings to a :class:`Segmenter`
``segmenter``          :class:`Segmenter`, encoder → pooling → decoder → losses
``outputs``            what the modules return: the contract with the instruments
``encoder3d``          the baseline's encoder: the sparse U-Net alone
``encoder_bifusion``   BiFusion's encoder, from ``clip``, ``heads``, ``projection``, ``geometry_encoding``, ``film``
                       and ``gate``
``unet``               Res16UNet on the engines of ``sparse``
``pooling``            points → superpoints
``decoder``            superpoint, text and learnable queries → instances, with ``attention``
``mask3d``             point queries → instances, with ``fps``, ``fourier`` and ``scale_pooling``
``segments``           sums and means over the points of a superpoint
``losses``             one file a loss term
``checkpoints``        weights of other projects and of earlier runs, read by ``weight_files``
=====================  ================================================================================
"""
