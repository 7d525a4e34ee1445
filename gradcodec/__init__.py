"""A codec library for LoRA updates: layouts, codecs, entropy coding, wire format, training. Knows no Flower, no models.

Where to start: ``layout.Layout`` for an adapter's tensors, ``build.build_codec`` for a codec by its settings,
``exchange.encode_update`` and ``exchange.decode_update`` for the two halves of a transfer, ``registry.register`` for a
codec of one's own.
"""
