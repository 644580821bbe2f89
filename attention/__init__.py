"""Sparse attention for video: layouts, methods, schedules, state and records. Pure torch; knows neither ComfyUI nor Triton."""
