"""Aliyun DashScope (Model Studio): Wan and Qwen image models."""

from jobdaemon.providers.dashscope.provider import DashScopeProvider

__all__ = ["DashScopeProvider"]
