"""What other trainers call our fields, and how values are spelled there. They are suggested, never taken."""

from collections.abc import Collection, Sequence

# Field → its names in transformers' Trainer and configs, TRL, PEFT, MaxText, Megatron, nanoGPT and the like.
_FIELDS = {
    "model.structure": "arch architecture model_type moe_type",
    "model.num_layers": "num_hidden_layers n_layer n_layers num_decoder_layers base_num_decoder_layers depth",
    "model.hidden_size": "d_model n_embd n_embed dim model_dim embed_dim emb_dim base_emb_dim hidden_dim",
    "model.num_heads": "num_attention_heads n_head n_heads num_query_heads base_num_query_heads",
    "model.num_kv_heads": "num_key_value_heads num_query_groups base_num_kv_heads n_kv_head n_kv_heads",
    "model.head_dim": "kv_channels d_head head_size",
    "model.vocab_size": "padded_vocab_size n_vocab",
    "model.context_length": "max_position_embeddings model_max_length n_ctx",
    "model.norm": "normalization norm_type",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_epsilon "
    "normalization_layer_epsilon",
    "model.positions": "position_embedding_type position_embedding pos_emb positional_encoding",
    "model.rope_theta": "rotary_base rope_base rope_max_timescale",
    "model.activation": "hidden_act hidden_activation activation_function act_fn mlp_activations",
    "model.gated": "swiglu glu gated_linear_unit",
    "model.use_bias": "bias add_bias_linear attention_bias mlp_bias add_qkv_bias",
    "model.qk_norm": "qk_layernorm use_qk_norm",
    "model.tie_embeddings": "tie_word_embeddings tie_weights logits_via_embedding share_embeddings",
    "model.dropout": "hidden_dropout attention_dropout resid_pdrop dropout_rate hidden_dropout_prob",
    "model.num_experts": "n_experts num_local_experts n_routed_experts num_moe_experts moe_num_experts",
    "model.top_k": "num_experts_per_tok num_experts_per_token experts_per_token moe_router_topk moe_top_k "
    "num_selected_experts",
    "model.first_dense_layers": "first_k_dense_replace first_num_dense_layers moe_layer_freq",
    "model.dense_hidden_size": "intermediate_size ffn_hidden_size ffn_dim mlp_dim base_mlp_dim d_ff",
    "model.expert_hidden_size": "moe_intermediate_size moe_ffn_hidden_size base_moe_mlp_dim moe_mlp_dim expert_dim "
    "intermediate_size ffn_hidden_size ffn_dim mlp_dim base_mlp_dim d_ff",
    "model.num_shared_experts": "n_shared_experts shared_experts",
    "model.shared_expert_hidden_size": "shared_expert_intermediate_size moe_shared_expert_intermediate_size",
    "model.capacity_factor": "expert_capacity_factor moe_expert_capacity_factor expert_capacity",
    "model.router_scores": "scoring_func score_func routed_score_func moe_router_score_function",
    "model.router_renormalize": "norm_topk_prob norm_top_k_prob",
    "model.router_scale": "routed_scaling_factor moe_router_topk_scaling_factor routed_scale route_scale",
    "model.balance": "load_balancing moe_router_load_balancing_type",
    "model.balance_coefficient": "router_aux_loss_coef moe_aux_loss_coeff aux_loss_coef aux_loss_coeff aux_loss_alpha "
    "load_balance_loss_weight",
    "model.balance_bias_rate": "moe_router_bias_update_rate routed_bias_update_rate bias_update_speed",
    "model.z_loss_coefficient": "z_loss router_z_loss_coef moe_z_loss_coeff z_loss_multiplier",
    "model.num_expert_groups": "n_group n_groups n_routing_groups moe_router_num_groups",
    "model.top_groups": "topk_group topk_routing_group moe_router_group_topk",
    "model.mamba_heads": "mamba_num_heads mamba_n_heads",
    "model.mamba_head_dim": "mamba_d_head",
    "model.mamba_groups": "mamba_num_groups mamba_n_groups",
    "model.mamba_state": "ssm_state_size d_state mamba_d_state mamba_state_dim",
    "model.mamba_conv": "conv_kernel d_conv mamba_d_conv",
    "model.mamba_conv_bias": "use_conv_bias",
    "model.mamba_bias": "mamba_proj_bias",
    "execution.mamba_chunk": "mamba_chunk_size",
    "execution.dtype": "bf16 fp16 torch_dtype compute_dtype mixed_precision precision params_dtype",
    "execution.remat": "gradient_checkpointing activation_checkpointing remat_policy recompute recompute_granularity",
    "execution.attention": "attn_implementation attention_backend flash_attention use_flash_attn",
    "mesh.data": "dp dp_size data_parallel_size data_parallelism ici_data_parallelism",
    "mesh.replica": "dcn_data_parallelism dcn_dp num_slices hsdp hybrid_shard data_parallel_replicate_degree",
    "mesh.expert": "ep ep_size expert_parallel_size expert_parallelism expert_model_parallel_size "
    "ici_expert_parallelism",
    "mesh.tensor": "tp tp_size tensor_parallel_size tensor_parallelism tensor_model_parallel_size "
    "ici_tensor_parallelism",
    "mesh.fsdp": "zero zero_stage use_distributed_optimizer ici_fsdp_parallelism",
    "data.source": "dataset dataset_name dataset_path train_file train_files train_data data_path hf_path corpus",
    "data.validation_source": "validation_file eval_dataset eval_file valid_data_path",
    "data.test_source": "test_file test_data_path",
    "data.mixture": "dataset_mixer blend",
    "data.text_field": "dataset_text_field text_column",
    "data.tokenizer": "tokenizer_path tokenizer_name tokenizer_model tokenizer_type vocab_file",
    "data.sequence_length": "seq_len seq_length block_size max_length max_seq_len max_seq_length "
    "max_target_length cutoff_len",
    "data.batch_size": "bs train_batch_size global_batch_size micro_batch_size per_device_batch_size "
    "per_device_train_batch_size",
    "data.num_workers": "dataloader_num_workers grain_worker_count",
    "optimizer.name": "optim opt opt_type optimizer_type",
    "optimizer.schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule lr_decay_style",
    "optimizer.learning_rate": "lr max_lr peak_lr base_lr",
    "optimizer.final_learning_rate": "min_lr end_lr lr_end",
    "optimizer.warmup_steps": "warmup warmup_iters warmup_ratio num_warmup_steps lr_warmup_steps lr_warmup_iters",
    "optimizer.decay_steps": "decay_iters lr_decay_iters num_decay_steps lr_decay_steps lr_wsd_decay_iters",
    "optimizer.b1": "beta1 beta_1 adam_b1 adam_beta1",
    "optimizer.b2": "beta2 beta_2 adam_b2 adam_beta2",
    "optimizer.eps": "epsilon adam_eps adam_epsilon",
    "optimizer.average_decay": "ema ema_decay",
    "optimizer.weight_decay": "wd l2 adam_weight_decay",
    "optimizer.clip_norm": "max_grad_norm grad_clip clip_grad clip_grad_norm gradient_clip gradient_clipping "
    "gradient_clip_val gradient_clipping_threshold",
    "train.init_from": "init base_model pretrained pretrained_checkpoint model_name_or_path load_parameters_path",
    "train.steps": "max_steps num_steps total_steps train_steps train_iters max_iters num_train_steps iterations "
    "epochs num_epochs num_train_epochs",
    "train.accumulate_steps": "grad_accum gradient_accumulation gradient_accumulation_steps accumulation_steps",
    "train.seed": "random_seed data_seed",
    "train.log_every": "logging_steps log_interval log_period log_steps",
    "train.eval_every": "eval_steps eval_interval",
    "train.checkpoint_every": "save_steps save_every save_interval checkpoint_period checkpoint_interval",
    "train.keep_checkpoints": "save_total_limit max_to_keep max_num_checkpoints_to_keep",
    "train.wandb": "wandb_project report_to",
    "tuning.objective": "stage task_type loss_type",
    "tuning.chat_template": "chat_template_path template",
    "tuning.lora_rank": "r rank lora_r lora_dim",
    "tuning.lora_alpha": "alpha",
    "tuning.lora_targets": "target_modules lora_target lora_target_modules",
    "tuning.teacher": "teacher_model teacher_model_name_or_path",
    "tuning.dpo_beta": "beta",
    "cache_dir": "compilation_cache_dir jax_cache_dir jax_compilation_cache_dir",
}
# Flag → its names elsewhere. A name may stand at several: a command has one of them, or is asked about both.
_FLAGS = {
    "output": "out output_dir output_file save save_path",
    "workdir": "out out_dir output_dir outdir save save_dir run run_dir run_name logdir log_dir base_output_directory "
    "resume resume_from resume_from_checkpoint model model_path model_dir model_name_or_path load",
    "checkpoint": "hf_path model_name_or_path pretrained source",
    "config": "c conf cfg config_file config_path config_name",
    "prompt": "text query",
    "prompts": "input input_file prompt_file prompts_file",
    "max_tokens": "max_new_tokens num_tokens n_predict max_gen_len",
    "temperature": "temp",
    "max_length": "max_model_len ctx_size context",
    "batch_size": "bs max_num_seqs max_batch_size eval_batch_size",
    "weights": "quantization quantize",
    "speculate": "num_speculative_tokens draft_tokens",
    "draft_with": "speculative_algorithm",
    "model_name": "served_model_name",
    "api_key_file": "api_key",
    "host": "bind ip address",
    "limit": "max_samples num_samples",
    "text_file": "file input",
    "hardware": "gpu accelerator",
    "topology": "slice cluster",
    "cpu_devices": "devices num_devices",
    "coordinator": "master_addr coordinator_address jax_coordinator_address",
    "num_processes": "nnodes num_nodes num_hosts world_size",
    "process_id": "rank node_rank process_index host_id",
}
# Value → how it is called elsewhere.
_VALUES = {
    "float16": "fp16 f16 half",
    "bfloat16": "bf16 fp16 half mixed",
    "float32": "fp32 f32 single float full",
    "float8_e4m3": "fp8 float8 e4m3",
    "int8": "i8 8bit q8",
    "rope": "rotary",
    "learned": "absolute learned_absolute",
    "silu (model.gated=true)": "swiglu",
    "gelu (model.gated=true)": "geglu",
    "silu": "swish",
    "adamw": "adam",
    "aux_loss": "aux auxiliary load_balancing_loss switch",
    "bias": "loss_free noaux_tc expert_bias",
    "all_to_all": "a2a",
    "gather": "all_gather",
    "auto": "default flash flash_attention flash_attention_2 sdpa eager",
    "layer": "full true yes block",
    "exchange": "selective",
    "none": "null no false off disabled",
    "pretrain": "lm clm causal_lm pt text",
    "sft": "chat instruct instruction finetune",
    "fine_grained": "deepseek deepseek_moe deepseekmoe",
    "vanilla": "mixtral moe",
    "dense": "mlp llama",
    "sotu": "default",
    "bpe": "byte_pair",
    "bytes": "byte utf8 byte_level",
    "attention": "q_proj k_proj v_proj o_proj qkv_proj attn",
    "experts": "gate_proj up_proj down_proj",
    "validation": "valid val dev",
    "true": "yes y on",
    "false": "no n off none null",
}


def other_field(name: str) -> list[str]:
    """The fields that are called `name`, or GROUP.`name`, elsewhere."""
    return _look(_FIELDS, name.rpartition(".")[2])


def other_flag(name: str, known: Sequence[str]) -> list[str]:
    """The first of a command's flags `known` that is called `name` elsewhere."""
    return [flag for flag in _look(_FLAGS, name) if flag in known][:1]


def other_value(text: str, choices: Collection[str]) -> list[str]:
    """The one of `choices` that is called `text` elsewhere, maybe with what has to be said besides."""
    return [value for value in _look(_VALUES, text) if value.partition(" ")[0] in choices]


def _look(table: dict[str, str], name: str) -> list[str]:
    word = name.lower().replace("-", "_")
    return [ours for ours, theirs in table.items() if word in theirs.replace("-", "_").split()]
