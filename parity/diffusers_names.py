"""Official names of the transformer's parameters -> those of diffusers: patterns, replaced one after the other."""

TRANSFORMER_NAMES = [
    (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"^time_projection\.1", "condition_embedder.time_proj"),
    (r"self_attn", "attn1"),
    (r"cross_attn", "attn2"),
    (r"\.([qkv])\.", r".to_\1."),
    (r"\.o\.", ".to_out.0."),
    (r"norm3", "norm2"),  # the official norm1 and norm2 have no weights
    (r"ffn\.0", "ffn.net.0.proj"),
    (r"ffn\.2", "ffn.net.2"),
    (r"^head\.head", "proj_out"),
    (r"^head\.modulation|modulation$", "scale_shift_table"),
]
