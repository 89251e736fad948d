"""The settings of MindFormers' Mixtral YAMLs, r1.1 to r1.7, section by section, and the rule of each.

Names that share a rule stand in one string. `callbacks[TYPE].name` are the settings of a callback of that type; `.*`
stands for any name. Facts are from the YAMLs, MoEConfig, LlamaConfig and the templates of r1.7.0.
"""

from __future__ import annotations

from ostro.migrate import rules
from ostro.migrate.rules import Rule, changed, here, inert, key, none, number, only, option, switch, whole, word

_COMPILER = none("MindSpore's compiler and runtime")
_READERS = none("rows are read as they are needed; ostro prepare has --workers")
_FP32 = here("computed in fp32")
_NARROW = changed("computed in fp32 here")
_SENDING = none("how things are sent is the parallel modules' affair")
_PAGES = none("keys and values take the memory they need")
_LEFTOVER = inert("nothing of Mixtral's reads it")
_BIAS = inert("its callback does not find Mixtral's experts, so the bias stays 0")
_THROWN_AWAY = inert("computed, and never added to the loss of Mixtral")
_OTHER_MOE = "Mixtral has no such thing"
_OTHER_ROPE = "rotary positions are not stretched"
_MONITOR = "ostro train writes metrics.jsonl and pictures by itself"


def _dataset(which: str, folder: Rule) -> dict[str, Rule]:
    return {
        "data_loader.type": only(("MindDataset",), here("what a file is, is seen"), "give records to data.path"),
        "data_loader.dataset_dir data_loader.dataset_files": folder,
        "data_loader.shuffle": key("data.shuffle", convert=switch) if which == "train" else here("never shuffled"),
        "input_columns": here("rows with labels learn where these are not −100, others everywhere"),
        "num_parallel_workers python_multiprocessing numa_enable prefetch_size": _READERS,
        "drop_remainder": changed("a batch that an epoch does not fill goes on with the next epoch")
        if which == "train"
        else here("every row is evaluated, once"),
        "batch_size": inert("the global batch takes its place"),
        "repeat": rules.repeat if which == "train" else here("every row is evaluated, once"),
        "seed": none("train.seed decides the order"),
        "profile": _READERS,
    }


def _dtype(exact: str) -> Rule:
    return rules.when(exact, "float32", _FP32, _NARROW)


TABLE: dict[str, dict[str, Rule]] = {
    "": {
        "seed": key("train.seed", convert=whole),
        "output_dir": changed("run.dir is a folder of its own, so that no files mix"),
        "run_mode": only(
            ("train", "finetune", "predict", "eval"), here("says which kind of recipe this is"), "nothing else runs"
        ),
        "load_checkpoint": rules.weights,
        "src_strategy_path_or_dir": key("weights.strategy", "null finds what lies beside", rules.path),
        "auto_trans_ckpt transform_process_num load_ckpt_format load_ckpt_async remove_redundancy balanced_load "
        "ckpt_use_legacy_format": here("any format and any layout is read into any other"),
        "only_save_strategy": none("ostro plan says what a layout needs"),
        "resume_training": changed("a run goes on from its own run.dir; MindSpore's optimizer state is not taken over"),
        "ignore_data_skip data_skip_steps": here("a resumed run goes on at its row"),
        "use_parallel": here("the degrees decide, whose product is --nproc-per-node × --nnodes"),
        "use_legacy": only((True,), here("this is the model of r1.7"), "only the llama modules have Mixtral"),
        "micro_batch_interleave_num": rules.interleave,
        "do_eval": here("there is evaluation where train.eval_every is above 0"),
        "eval_step_interval": rules.eval_every,
        "eval_epoch_interval": rules.eval_epochs,
        "profile": rules.profile,
        "profile_start_step profile_stop_step": rules.profile,
        "profile_communication profile_memory profile_pipeline profile_rank_ids profile_level mstx "
        "init_start_profile": none("one trace, and a table of the slowest operations"),
        "layer_scale layer_decay lr_scale lr_scale_factor": _LEFTOVER,
        "auto_tune filepath_prefix autotune_per_step": _LEFTOVER,
        "remote_save_url": none("checkpoints stay on the disk"),
        "print_separate_loss": here("metrics.jsonl has each loss"),
        "predict_batch_size input_data save_file": changed("arguments of ostro generate: PROMPT…, --out"),
        "adapter_id": only((None, ""), here("no adapter"), "adapters of MindFormers are not read"),
    },
    "trainer": {
        "type": only(("CausalLanguageModelingTrainer",), here("the one there is"), "Ostro trains language models"),
        "model_name": here("the sizes say which model it is"),
    },
    "runner_config": {
        "epochs": rules.epochs,
        "batch_size": key("train.micro_batch_sequences", convert=whole),
        "gradient_accumulation_steps": rules.accumulation,
        "sink_mode sink_size sink_per_epoch": _COMPILER,
        "stop_step": rules.stop,
        "num_classes": _LEFTOVER,
    },
    "optimizer": {
        "type": word(
            "optim.name",
            {"AdamW": "adamw", "FP32StateAdamWeightDecay": "fp32_state_adam_weight_decay"},
            "Ostro has no such optimizer",
        ),
        "betas beta1 beta2": rules.betas,
        "eps": key("optim.eps", convert=number),
        "weight_decay": key("optim.weight_decay", "of matrices, as there", number),
        "learning_rate": rules.rate_of_optimizer,
    },
    "lr_schedule": {
        "type": word(
            "optim.schedule",
            {
                "CosineWithWarmUpLR": "cosine_mindformers",
                "LinearWithWarmUpLR": "linear",
                "ConstantWarmUpLR": "constant",
            },
            "Ostro has no such schedule",
        ),
        "learning_rate": key("optim.learning_rate", convert=number),
        "lr_end": key("optim.min_learning_rate", convert=number),
        "warmup_ratio": key("optim.warmup_ratio", convert=number),
        "warmup_steps": rules.warmup_steps,
        "total_steps": key("optim.total_steps", "of the schedule; −1 is the run's own", whole),
        "warmup_lr_init": only((0, 0.0), here("warm-up begins at 0"), "warm-up begins at 0"),
        "num_cycles": only((0.5,), here("half a wave"), "the cosine is half a wave"),
    },
    "train_dataset": _dataset("train", key("data.path", convert=rules.paths)),
    "eval_dataset": _dataset("eval", rules.eval_data),
    "train_dataset_task eval_dataset_task": {
        "type": only(("CausalLanguageModelDataset",), here("the one there is"), "Ostro trains language models"),
        "dataset_config": here("the same data set once more"),
    },
    "moe_config": {
        "expert_num": key("model.num_local_experts", convert=whole),
        "num_experts_chosen": key("model.num_experts_per_tok", convert=whole),
        "capacity_factor": rules.capacity,
        "enable_sdrop": rules.drop,
        "aux_loss_factor": rules.balance,
        "z_loss_factor": rules.z_loss,
        "aux_loss_types aux_loss_factors": _THROWN_AWAY,
        "routing_policy": only(("TopkRouterV2",), here("Mixtral's router"), "this router is not Mixtral's"),
        "router_dense_type": rules.when("moe_config.router_dense_type", "bfloat16", _NARROW, _FP32),
        "norm_topk_prob": only((True,), here("weights are divided by their sum"), "Mixtral's weights add up to 1"),
        "topk_method": only(("greedy",), here("the largest probabilities"), _OTHER_MOE),
        "topk_group n_group expert_group_size": only((None,), here("experts have no groups"), _OTHER_MOE),
        "routed_scaling_factor": only((1, 1.0), here("weights are not scaled"), _OTHER_MOE),
        "use_gating_sigmoid": only((False,), here("softmax"), "moe.router=sigmoid is another model: set it yourself"),
        "shared_expert_num": only((0,), here("no shared experts"), _OTHER_MOE),
        "use_shared_expert_gating moe_shared_expert_overlap": only((False,), here("no shared experts"), _OTHER_MOE),
        "use_fused_ops_topkrouter use_fused_ops_permute": here("the same results with and without"),
        "use_gmm": here("products of experts are always grouped; True is why nothing is dropped"),
        "enable_gmm_safe_tokens": here("an expert without tokens is no exception"),
        "balance_via_topk_bias topk_bias_update_rate": _BIAS,
        "group_wise_a2a use_allgather_dispatcher enable_deredundency npu_nums_per_device expert_model_parallel "
        "dispatch_global_max_bs ep_extend_tp": _SENDING,
        "comp_comm_parallel comp_comm_parallel_degree": none("capacity is not rounded for it"),
        "max_router_load": here("there is no limit"),
        "callback_moe_droprate": here("drop_rate stands in metrics.jsonl"),
        "save_token_distribution": here("expert_load stands in metrics.jsonl"),
        "enable_cold_hot_expert update_step hot_expert_num cold_token_percent moe_module_name cur_layer "
        "first_k_dense_replace moe_intermediate_size": _LEFTOVER,
    },
    "parallel": {
        "parallel_mode": only((1, "semi_auto_parallel"), here("the degrees below"), "give the degrees one by one"),
        "gradients_mean": changed("the loss is divided by the labels of the whole step, there of a micro-batch"),
        "enable_alltoall": _SENDING,
        "full_batch search_mode dataset_strategy": _COMPILER,
        "enable_parallel_optimizer": here("says whether data ranks shard (fsdp) or replicate (dp)"),
        "strategy_ckpt_save_file": here("checkpoints say themselves who holds what"),
        "parallel_optimizer_config.gradient_accumulation_shard": key(
            "parallel.gradient_accumulation_shard", convert=switch
        ),
        "parallel_optimizer_config.parallel_optimizer_threshold": none("norms and routers alone are never cut"),
        "parallel_optimizer_config.optimizer_weight_shard_size": rules.shard_size,
    },
    "parallel_config": {
        "data_parallel": rules.data_parallel,
        "model_parallel": key("parallel.tp", convert=whole),
        "expert_parallel": key("parallel.ep", convert=whole),
        "pipeline_stage": key("parallel.pp", convert=whole),
        "context_parallel": key("parallel.cp", "MindFormers' Mixtral refuses more than 1", whole),
        "micro_batch_num": rules.micro_batches,
        "use_seq_parallel": rules.sequence_parallel,
        "vocab_emb_dp": key("parallel.vocab_emb_dp", convert=switch),
        "gradient_aggregation_group": key("parallel.gradient_aggregation_group", convert=whole),
        "optimizer_shard": _LEFTOVER,
        "context_parallel_algo ulysses_degree_in_cp mem_coeff": _SENDING,
        "seq_split_num": only((1,), here("1 changes nothing"), "a sequence is not cut between pipeline steps"),
    },
    "recompute_config": {
        "recompute": rules.recompute,
        "select_recompute": rules.select_recompute,
        "select_recompute_exclude select_comm_recompute select_comm_recompute_exclude "
        "parallel_optimizer_comm_recompute mp_comm_recompute recompute_slice_activation": none(
            "train.recompute has three words: none, selective, full"
        ),
    },
    "swap_config": {
        "swap": only((False,), here("off"), "activations do not go to host memory"),
        "layer_swap op_swap default_prefetch": inert("swap is off"),
    },
    "callbacks[MFLossMonitor]": {
        "type": here("a line a step on the console, and metrics.jsonl"),
        "per_print_times": key("run.log_every", convert=whole),
    },
    "callbacks[CheckpointMonitor]": {
        "type": here("checkpoints are always written"),
        "prefix": none("checkpoints are called step-N"),
        "directory": none("checkpoints lie in run.dir"),
        "save_checkpoint_steps": key("checkpoint.every", convert=whole),
        "save_checkpoint_seconds keep_checkpoint_per_n_minutes": none("checkpoints are counted in steps"),
        "keep_checkpoint_max": key("checkpoint.keep", convert=whole),
        "async_save": key("checkpoint.async", convert=switch),
        "integrated_save": here("each rank writes what it holds, and any layout reads it"),
        "checkpoint_format remove_redundancy use_legacy_format": here("each value is written once; ostro convert"),
        "save_optimizer save_network_params save_trainable_params append_info": here("everything is saved"),
        "exception_save": here("SIGTERM and Ctrl-C save"),
    },
    "callbacks[ObsMonitor]": {"*": none("checkpoints stay on the disk")},
    "callbacks[SummaryMonitor]": {"*": here(_MONITOR)},
    "callbacks[TrainingStateMonitor]": {"*": here(_MONITOR)},
    "callbacks[ProfileMonitor]": {"*": here("profile.steps")},
    "callbacks[EvalCallBack]": {"*": here("train.eval_every")},
    "callbacks[MoEDropRateCallback]": {"*": here("drop_rate stands in metrics.jsonl")},
    "callbacks[TopkBiasBalanceCallback]": {"*": _BIAS},
    "callbacks[ColdHotExpertMonitor]": {"*": _LEFTOVER},
    "callbacks[StressDetectCallBack]": {"*": none("ostro doctor looks at the machine")},
    "callbacks[SDCMonitor]": {"*": none("ostro doctor looks at the machine")},
    "eval_callbacks[ObsMonitor]": {"*": none("checkpoints stay on the disk")},
    "context": {
        "mode device_target device_id max_call_depth max_device_memory mempool_block_size memory_optimize_level "
        "save_graphs save_graphs_path enable_graph_kernel graph_kernel_flags jit_level jit_config.jit_level "
        "jit_config.infer_boost ascend_config.precision_mode ascend_config.parallel_speed_up_json_path "
        "memory_offload affinity_cpu_list runtime_num_threads compile_cache_path enable_compile_cache "
        "save_dump_path": _COMPILER,
        "deterministic": here("a run on the same machine gives the same bits"),
    },
    "model": {
        "arch.type": only(("LlamaForCausalLM",), here("Mixtral, there Llama with experts"), "this is another model"),
    },
    "model.model_config": {
        "type": only(("LlamaConfig",), here("Mixtral, there Llama with experts"), "this is another model"),
        "vocab_size": key("model.vocab_size", convert=whole),
        "hidden_size": key("model.hidden_size", convert=whole),
        "intermediate_size": key("model.intermediate_size", convert=whole),
        "num_layers": key("model.num_hidden_layers", convert=whole),
        "num_heads": key("model.num_attention_heads", convert=whole),
        "n_kv_heads": key("model.num_key_value_heads", convert=whole),
        "head_dim": key("model.head_dim", convert=whole),
        "max_position_embedding": key("model.max_position_embeddings", convert=whole),
        "theta": key("model.rope_theta", convert=number),
        "rms_norm_eps": key("model.rms_norm_eps", convert=number),
        "init_method_std": key("model.initializer_range", convert=number),
        "tie_word_embeddings": key("model.tie_word_embeddings", convert=switch),
        "bos_token_id": key("model.bos_token_id", convert=whole),
        "eos_token_id": key("model.eos_token_id", convert=whole),
        "pad_token_id": key("data.pad_token_id", "nothing is learned after it, as there", whole),
        "ignore_token_id": only((-100,), here("nothing is learned where it stands"), "labels use −100"),
        "seq_length": key("data.seq_length", convert=whole),
        "multiple_of ffn_dim_multiplier": inert("the inner size of the experts is given"),
        "batch_size": here("any number of prompts"),
        "compute_dtype": word(
            "train.dtype",
            {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"},
            "this is no dtype of training",
        ),
        "param_init_type embedding_init_type": rules.initial_dtype,
        "layernorm_compute_type": _dtype("model.model_config.layernorm_compute_type"),
        "softmax_compute_type": _dtype("model.model_config.softmax_compute_type"),
        "rotary_dtype": _dtype("model.model_config.rotary_dtype"),
        "residual_dtype": changed("the dtype of training"),
        "offset": rules.stage_layers,
        "pp_interleave_num": only((1,), here("one stage a rank"), "set parallel.schedule and virtual_stages yourself"),
        "extend_method": only(("None", None), here(_OTHER_ROPE), _OTHER_ROPE),
        "scaling_factor": only((1, 1.0, None), here(_OTHER_ROPE), _OTHER_ROPE),
        "pretrain_seqlen": inert("read where rotary positions are stretched"),
        "qkv_has_bias attn_proj_has_bias": only((False,), here("no biases"), "Mixtral has no biases"),
        "qkv_concat": here("seen in the weights"),
        "use_flash_attention use_rope_slice use_attn_mask_compression use_ring_attention fused_rms_norm "
        "rmsnorm_compute_2d compute_in_2d fine_grain_interleave parallel_optimizer": here(
            "the same results with and without; the kernels are chosen for the device"
        ),
        "use_eod_attn_mask_compression input_sliced_sig is_dynamic return_hidden_states": only(
            (False,), here("off"), "records are trained as the scripts of r1.7 make them"
        ),
        "calculate_per_token_loss": changed("always: each label of a step weighs the same"),
        "checkpoint_name_or_path": rules.weights,
        "use_past use_past_shard": here("generation keeps keys and values"),
        "block_size num_blocks chunk_prefill": _PAGES,
        "quant_config": only((None,), here("not quantised"), "quantised weights are not read"),
        "llm_backend": only(("", None), here("none"), "Ostro runs the model itself"),
        "max_decode_length": option("--max-new-tokens", whole, "there the prompt is counted as well"),
        "max_new_tokens": option("--max-new-tokens", whole),
        "do_sample": rules.temperature,
        "temperature": inert("a part of --temperature, where tokens are sampled"),
        "top_k": rules.of_sampling("--top-k", whole),
        "top_p": rules.of_sampling("--top-p", number, "there the token that crosses it is left out, here it is kept"),
        "repetition_penalty": option("--repetition-penalty", number, "there the padding is penalised, too"),
    },
    "processor": {
        "type": only(("LlamaProcessor",), here("the tokenizer alone"), "Mixtral's data are text"),
        "return_tensors": _LEFTOVER,
        "tokenizer.type": only(("LlamaTokenizer", "LlamaTokenizerFast"), here("seen in the file"), "not Mixtral's"),
        "tokenizer.vocab_file tokenizer.tokenizer_file": rules.vocabulary,
        "tokenizer.unk_token tokenizer.bos_token tokenizer.eos_token tokenizer.pad_token": here("the tokenizer's own"),
        "tokenizer.add_bos_token tokenizer.add_eos_token": here("a prompt begins with BOS, a document ends with EOS"),
    },
    "metric": {"type": only(("PerplexityMetric",), here("ostro evaluate prints it"), "use ostro evaluate")},
    "runner_wrapper": {
        "type": only(
            ("MFTrainOneStepCell", "MFPipelineWithLossScaleCell"), here("the one loop"), "Ostro has one training loop"
        ),
        "scale_sense.type": only(
            ("DynamicLossScaleUpdateCell",),
            rules.when("model.model_config.compute_dtype", "float16", here("fp16 scales its loss so"), here("no fp16")),
            "fp16 trains with a dynamic loss scale",
        ),
        "scale_sense.loss_scale_value": rules.loss_scale("train.loss_scale"),
        "scale_sense.scale_factor": only((2,), here("halves and doubles"), "a loss scale halves and doubles"),
        "scale_sense.scale_window": rules.loss_scale("train.loss_scale_window"),
        "use_clip_grad": rules.clip,
        "max_grad_norm": key("optim.max_grad_norm", convert=number),
        "calculate_per_token_loss": changed("always: each label of a step weighs the same"),
    },
}

RULES: dict[str, Rule] = {
    f"{section}.{name}".lstrip("."): rule
    for sections, entries in TABLE.items()
    for section in sections.split() or [""]
    for names, rule in entries.items()
    for name in names.split()
}
