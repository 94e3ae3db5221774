"""ComfyUI servers of one's own, as a provider."""

from jobdaemon.providers.comfyui.provider import ComfyUIProvider

__all__ = ["ComfyUIProvider"]
