"""ComfyUI's door. It imports nothing until ComfyUI asks, so the folder may be called anything and read from anywhere."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The V3 extension that lists this pack's nodes."""
    from .nodes import SparseVideoAttentionExtension

    return SparseVideoAttentionExtension()
