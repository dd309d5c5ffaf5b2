use serde_json::json;

use super::*;

const LIMITS: Limits = Limits { vocab_size: 1000, context: 256, sequences: 64 };

fn refused(
    parse: fn(Value, &Limits) -> Result<GenerateRequest, ApiError>,
    body: Value,
) -> (String, &'static str, String) {
    let error = parse(body.clone(), &LIMITS).expect_err(&body.to_string());
    assert_eq!(error.status.as_u16(), 400, "{body}");
    (error.param.unwrap_or_default(), error.code.unwrap_or_default(), error.message)
}

#[test]
fn a_completion_has_the_defaults_of_its_api() {
    let request = completion(json!({"model": "m", "prompt": "a"}), &LIMITS).unwrap();
    let params = &request.params;
    assert!(matches!(&request.prompts[..], [Prompt::Text { text, add_special_tokens: true }] if text == "a"));
    assert_eq!((params.max_tokens, params.n, params.logprobs, params.stream), (Some(16), 1, None, false));
    assert_eq!(params.sampling, Sampling::plain());
    assert_eq!((params.sampling.temperature, params.sampling.top_p, params.sampling.seed), (1.0, 1.0, None));
}

#[test]
fn a_lease_needs_a_session() {
    let leased = json!({"prompt": "a", "lease_ms": 5000, "prompt_cache_key": "s", "cache_salt": "t"});
    let params = completion(leased, &LIMITS).unwrap().params;
    assert_eq!((params.lease_ms, params.prompt_cache_key.as_str(), params.cache_salt.as_str()), (5000, "s", "t"));
    let found = refused(completion, json!({"prompt": "a", "lease_ms": 5000}));
    assert_eq!((found.0.as_str(), found.1), ("lease_ms", "invalid_value"));
    assert_eq!(refused(completion, json!({"prompt": "a", "lease_ms": 3_600_001})).0, "lease_ms");
    assert_eq!(refused(completion, json!({"prompt": "a", "cache_salt": ""})).0, "cache_salt");
}

#[test]
fn a_request_has_a_class_and_a_time() {
    let params = completion(json!({"prompt": "a", "priority": -8, "timeout": 1.5}), &LIMITS).unwrap().params;
    assert_eq!((params.priority, params.timeout_ms, params.tenant), (-8, 1500, 0));
    let tenants =
        ["s", "t"].map(|salt| completion(json!({"prompt": "a", "cache_salt": salt}), &LIMITS).unwrap().params);
    assert_ne!(tenants[0].tenant, tenants[1].tenant);
    for (field, value) in
        [("priority", json!(8)), ("priority", json!("high")), ("timeout", json!(0)), ("timeout", json!(90_000))]
    {
        assert_eq!(refused(completion, json!({"prompt": "a", field: value})).0, field);
    }
}

#[test]
fn a_chat_may_fill_the_context() {
    let messages = json!([{"role": "user", "content": "hi"}]);
    let request = chat(json!({"messages": messages}), &LIMITS).unwrap();
    assert_eq!(request.params.max_tokens, None);
    let both = json!({"messages": messages, "max_tokens": 9, "max_completion_tokens": 5, "logprobs": true});
    let params = chat(both, &LIMITS).unwrap().params;
    assert_eq!((params.max_tokens, params.logprobs), (Some(5), Some(0)));
}

#[test]
fn prompts_have_four_shapes() {
    let prompts = |prompt: Value| completion(json!({"prompt": prompt}), &LIMITS).map(|request| request.prompts);
    let texts = prompts(json!(["a", "b"])).unwrap();
    assert!(matches!(&texts[..], [Prompt::Text { text: a, .. }, Prompt::Text { text: b, .. }] if a == "a" && b == "b"));
    let ids = |prompt: Value| -> Vec<Vec<i32>> {
        let ids = |prompt| if let Prompt::Ids(ids) = prompt { ids } else { panic!("ids") };
        prompts(prompt).unwrap().into_iter().map(ids).collect()
    };
    assert_eq!(ids(json!([1, 2])), [[1, 2]]);
    assert_eq!(ids(json!([[1], [2, 3]])), [vec![1], vec![2, 3]]);
    let cases = [
        (json!([]), "prompt", "`prompt` is empty"),
        (json!(7), "prompt", "`prompt` is 7"),
        (json!([1, "a"]), "prompt[1]", "the string \"a\""),
        (json!(["a", 1]), "prompt[1]", "`prompt[1]` is 1; a string is wanted"),
        (json!([[1], "a"]), "prompt[1]", "like those before it"),
        (json!([1, 1000]), "prompt[1]", "`prompt[1]` is 1000; an integer from 0 to 999 is wanted"),
        (json!([-1]), "prompt[0]", "`prompt[0]` is -1"),
        (json!([1.5]), "prompt[0]", "`prompt[0]` is 1.5"),
        (json!([true]), "prompt[0]", "`prompt[0]` is true"),
    ];
    for (prompt, param, message) in cases {
        let found = refused(completion, json!({"prompt": prompt}));
        assert_eq!(found.0, param);
        assert!(found.2.contains(message), "{}", found.2);
    }
}

#[test]
fn values_out_of_range_are_refused() {
    let big = 1u64 << 31;
    let cases = [
        ("max_tokens", json!(0)),
        ("max_tokens", json!(big)),
        ("max_tokens", json!(-(1i64 << 31))),
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.5)),
        ("top_p", json!(1.1)),
        ("top_k", json!(-2)),
        ("top_k", json!(big)),
        ("min_p", json!(2)),
        ("presence_penalty", json!(-3)),
        ("frequency_penalty", json!(1e300)),
        ("repetition_penalty", json!(0)),
        ("seed", json!(u64::MAX)),
        ("n", json!(0)),
        ("n", json!(129)),
        ("n", json!(65)),
        ("logprobs", json!(21)),
        ("logprobs", json!(true)),
        ("stop", json!(["a", ""])),
        ("stop", json!(vec!["a"; 17])),
        ("stop[1]", json!(["a", 1])),
        ("stop_token_ids[0]", json!([1000])),
        ("logit_bias", json!({"1000": 1})),
        ("logit_bias", json!({"07": 1})),
        ("logit_bias", json!({"a": 1})),
        ("logit_bias.7", json!({"7": 101})),
        ("echo", json!("yes")),
        ("best_of", json!(2)),
        ("stream_options", json!({"include_usage": true})),
    ];
    for (param, value) in cases {
        let field = param.split(['.', '[']).next().unwrap();
        assert_eq!(refused(completion, json!({"prompt": "a", field: value})).0, param, "{value}");
    }
}

#[test]
fn what_is_not_served_is_refused_and_what_is_harmless_is_taken() {
    let messages = json!([{"role": "user", "content": "hi"}]);
    let harmless = [
        json!({"user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "auto", "parallel_tool_calls": false}),
        json!({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}),
        json!({"tools": null, "response_format": null, "stop": null, "n": null, "stream": null, "logit_bias": null}),
        json!({"stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false}}),
        json!({"chat_template_kwargs": {"enable_thinking": false}, "add_generation_prompt": true}),
    ];
    for mut body in harmless {
        body["messages"] = messages.clone();
        chat(body.clone(), &LIMITS).unwrap_or_else(|error| panic!("{body}: {}", error.message));
    }
    let cases = [
        ("tools", json!([{"type": "function"}]), "unsupported_parameter"),
        ("tool_choice", json!("required"), "unsupported_parameter"),
        ("response_format.type", json!({"type": "json_object"}), "invalid_value"),
        ("reasoning_effort", json!("low"), "unsupported_parameter"),
        ("audio", json!({}), "unsupported_parameter"),
        ("chat_template", json!("{{ x }}"), "unsupported_parameter"),
        ("chat_template_kwargs", json!({"messages": []}), "invalid_value"),
        ("stream_options.extra", json!({"extra": 1}), "unknown_parameter"),
        ("temprature", json!(1), "unknown_parameter"),
        ("top_logprobs", json!(2), "invalid_value"),
    ];
    for (param, value, code) in cases {
        let field = param.split('.').next().unwrap();
        let found = refused(chat, json!({"messages": messages, "stream": field == "stream_options", field: value}));
        assert_eq!((found.0.as_str(), found.1), (param, code));
    }
}

#[test]
fn messages_are_checked_one_by_one() {
    let cases = [
        (json!([]), "messages"),
        (json!("hi"), "messages"),
        (json!([1]), "messages[0]"),
        (json!([{"content": "a"}]), "messages[0].role"),
        (json!([{"role": "tool", "content": "a"}]), "messages[0].role"),
        (json!([{"role": "user", "content": "a"}, {"role": "user"}]), "messages[1].content"),
        (json!([{"role": "user", "content": 5}]), "messages[0].content"),
        (json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), "messages[0].content[0].type"),
        (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
        (json!([{"role": "user", "content": "a", "extra": 1}]), "messages[0].extra"),
        (json!([{"role": "assistant", "content": "a", "tool_calls": [{}]}]), "messages[0].tool_calls"),
    ];
    for (messages, param) in cases {
        assert_eq!(refused(chat, json!({"messages": messages})).0, param);
    }
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let earlier = json!({"role": "assistant", "content": "x", "refusal": null, "annotations": [], "tool_calls": null});
    let body = json!({"messages": [{"role": "user", "content": parts, "name": "Ann"}, earlier]});
    let Prompt::Chat(chat) = chat(body, &LIMITS).unwrap().prompts.remove(0) else { panic!("a chat") };
    assert_eq!(chat.messages[0], json!({"role": "user", "content": "a\nb", "name": "Ann"}));
    assert_eq!(chat.messages[1], json!({"role": "assistant", "content": "x"}));
}

#[test]
fn an_offline_line_is_one_prompt() {
    let (id, request) = offline(json!({"id": 7, "prompt": [1], "logprobs": 1000}), &LIMITS).unwrap();
    assert_eq!((id, request.params.logprobs, request.params.max_tokens), (json!(7), Some(1000), Some(16)));
    for body in
        [json!({"prompt": ["a", "b"]}), json!({"prompt": "a", "n": 2}), json!({"prompt": "a", "logprobs": 1001})]
    {
        offline(body, &LIMITS).unwrap_err();
    }
}
