"""Programs: what runs at a hook, described once as LLVM IR and compiled for the target."""
