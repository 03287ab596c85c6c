"""Row formats, sources, chat templates, masking and packing."""
