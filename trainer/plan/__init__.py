"""What a run will need, worked out before it starts: shapes, memory, communication, time.

    config, world size, device
      -> layout         degrees of the mesh, batch arithmetic, which layers a pipeline rank holds
      -> shapes         the model on ``meta``, converted: every distinct layer, global and local
      -> activations    bytes that a block keeps for backward under an activation checkpointing mode
      -> memory         one step, replayed: what is allocated when, in which of the allocator's pools
      -> communication  bytes that a rank sends, by kind
      -> step_time      from the ceilings of the device table, as a range
      -> plan           all of it as one value;  render and picture show it

Nothing is allocated and no process group exists, so 405B on 512 GPUs takes seconds on a laptop. The
trainer uses the same figures to choose what to recompute (`activation_checkpoint.mode = "auto"`).
"""
