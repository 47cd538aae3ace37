"""What files may say: tables of fields with their types and ranges, held against a file once, where it enters.

`rules.py` has the words that tables are made of, `config.py` walks config.json by the tables of `fields.py` and `rope.py`,
`tensors.py` holds a config against the names and shapes of the weights, `section.py` reads lowbit's own quantization_config,
`foreign.py` has those of other programs, `gguf.py` the metadata of a GGUF file, `words.py` what stands beside a tokenizer.
Nothing here imports transformers, and only `section.py` imports torch.
"""
