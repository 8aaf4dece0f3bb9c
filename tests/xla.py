"""XLA's flags for tests: programs run once or twice, so they are compiled fast rather than well."""

# Without LLVM's optimizations and without the fusion emitters, which take most of the time of compiling for a CPU.
FAST_COMPILES = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
