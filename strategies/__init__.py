"""Flower strategies of coded federations. Touches Flower records and gradcodec; nothing of models, data or Hydra."""
