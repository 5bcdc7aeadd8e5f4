"""The Monitor inside training frameworks, as their own kind of callback.

Each file needs its framework installed and is imported by its own name: ``bifusion_diag.integrations.mmengine``,
``.lightning``, ``.transformers``.
"""
