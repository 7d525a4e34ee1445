"""The codec ``learned``: a linear transform, an expected spectrum, a quantiser and entropy models, all trained."""
