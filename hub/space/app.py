"""The demo as a Hugging Face Space: `dcp-zoo demo` at the address that Spaces expect."""

from dcp_zoo.demo import launch

launch(host="0.0.0.0", port=7860)
