"""The SGLang side: the only folder that imports ``sglang``."""
