"""What `kvortex bench` measures, in vLLM processes of its own; scripts in bench/ share it."""
