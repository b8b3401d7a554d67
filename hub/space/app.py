"""The demo as a Hugging Face Space: what `dcp-zoo demo` shows, at the address that Spaces expect."""

from dcp_zoo.demo import launch

launch(host="0.0.0.0", port=7860)
