"""Weights that travel: ours <-> torch_ref.k_model <-> Hugging Face Llama <-> GGUF.

names.py      one table of names and layouts, both ways, bit for bit
dtypes.py     the dtypes weights are kept in, and rounding
configs.py    ModelConfig <-> the config.json of others
tensors.py    safetensors files, sharded and checked
gguf_file.py  one file for llama.cpp
export.py     what goes into an exported folder
folder.py     such a folder: all of it or nothing; its tokenizer
chat.py       the chat template, and chats as ids
load.py       weights that others wrote
compare.py    how far two networks are apart
card.py       the model card
"""

from jaxllm.convert.dtypes import cast
from jaxllm.convert.names import Format, from_state_dict, to_state_dict

__all__ = ["Format", "cast", "from_state_dict", "to_state_dict"]
