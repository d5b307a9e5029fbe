"""Callbacks: one file, one question. They read what the training step returns and hook into no module.

All of them read the same attributes of the LightningModule: `config` (a `schema.Config`), `model` (a `UnifiedModel`)
and `shield` (a [] float tensor). Nothing is imported here.
"""
