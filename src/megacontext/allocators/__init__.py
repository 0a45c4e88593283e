"""Allocators decide at which level of detail a working context holds each span."""
