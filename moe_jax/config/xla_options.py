"""XLA's options for a family of chips, as values of `compiler_options`."""

# For TPUs with SparseCores (v5p, v6e, tpu7x): they exchange weights and gradients while the TensorCore multiplies.
# Without the first option XLA waits for every all_to_all.
SPARSE_CORES = {
    "xla_tpu_enable_async_all_to_all": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    # else the TensorCore exchanges, in pieces between products
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "false",
}
# A layer's weights are gathered during the layer before, and its gradients scattered during the one after. libtpu
# 0.0.42.1 aborts on programs with further rounds of dispatch, so the step has them where every device has all experts.
BETWEEN_LAYERS = {
    "xla_tpu_enable_ici_ag_pipelining": "true",
    "xla_tpu_enable_ici_rs_pipelining": "true",
    "xla_tpu_enable_ag_backward_pipelining": "true",
    "xla_should_allow_loop_variant_parameter_in_chain": "ENABLED",
    "xla_should_add_loop_invariant_op_in_chain": "ENABLED",
}
