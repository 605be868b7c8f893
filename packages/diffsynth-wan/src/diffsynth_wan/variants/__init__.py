"""Variants of Wan that change the pass of the network, each an extension (`diffsynth_wan.extension`) and its module."""
