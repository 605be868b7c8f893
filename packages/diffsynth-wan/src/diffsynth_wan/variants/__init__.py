"""Variants of Wan that change the forward pass: an extension (`diffsynth_wan.extension`) and its network each."""
