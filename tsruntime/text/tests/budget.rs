//! Templates made to burn a server down get an error, soon and within the memory they are given, and the next chat is answered.

use std::time::{Duration, Instant};

use serde_json::json;
use tsruntime_text::{Chat, Sandbox, TemplateError, Templates};

fn sandbox(source: &str) -> Sandbox {
    let blob = json!({ "templates": { "default": source }, "tokens": {} }).to_string();
    let templates = Templates::open(blob.as_bytes()).unwrap().unwrap();
    Sandbox::new(&templates, vec![env!("CARGO_BIN_EXE_tstext").into(), "worker".into()])
}

fn chat(content: &str) -> Chat {
    Chat { messages: vec![json!({ "role": "user", "content": content })], ..Chat::default() }
}

/// Repeats `part` so often that it is as long as a template may be.
fn long(part: &str) -> String {
    part.repeat((200 << 10) / part.len())
}

#[test]
fn bombs_exceed_a_budget() {
    let bombs = [
        format!("{{{{ {} }}}}", "(".repeat(200_000)),
        format!("{{{{ {}1{} }}}}", "(".repeat(60_000), ")".repeat(60_000)),
        format!("{{{{ {}1 }}}}", long("not ")),
        format!("{{{{ 1{} }}}}", long("+1")),
        format!("{{{{ [{}] }}}}", long("[")),
        long("{% if 1 %}"),
        "{% for i in range(10**9) %}x{% endfor %}".into(),
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}".into(),
        "{{ 'a' * 10**9 }}".into(),
        "{{ ('a' * 10**8) ~ ('a' * 10**8) ~ ('a' * 10**8) }}".into(),
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}".into(),
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | list | length }}".into(),
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}".into(),
        "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}".into(),
        "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}".into(),
        "{{ ([0] * 10**8) | list | length }}".into(),
        "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}".into(),
        "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}".into(),
        "{{ '%999999999d' | format(1) }}".into(),
        "{{ ([1] * 10**7) | map('string') | join('xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx') }}".into(),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
        "{% for i in range(99999) %}{{ 'a' * 10**7 }}{% endfor %}".into(),
        "{% set x %}{% for i in range(99999) %}{{ 'a' * 10**7 }}{% endfor %}{% endset %}".into(),
    ];
    for source in bombs {
        let sandbox = sandbox(&source);
        let start = Instant::now();
        let result = sandbox.render(&chat("hi"));
        let time = start.elapsed();
        let shown: String = source.chars().take(80).collect();
        match result {
            Err(TemplateError::Budget(_)) => {}
            // A bomb that is refused for what it is, before it can go off.
            Err(TemplateError::Failed(error)) => println!("{shown}: {error}"),
            other => panic!("{shown}: {other:?}"),
        }
        // The child is held to half a second of CPU time; the rest is for busy machines.
        assert!(time < Duration::from_secs(10), "{shown}: {time:?}");
        println!("{time:?} {shown}");
    }
}

#[test]
fn a_chat_after_a_bomb_is_answered() {
    let sandbox = sandbox(
        "{% set ns = namespace(x='aaaaaaaa') %}{% if messages[0].content == 'burn' %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{% endif %}ok",
    );
    for _ in 0..3 {
        assert!(matches!(sandbox.render(&chat("burn")), Err(TemplateError::Budget(_))));
        assert_eq!(sandbox.render(&chat("hi")).unwrap(), "ok");
    }
}

#[test]
fn large_chats_fit_the_budget() {
    let sandbox = sandbox(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% if m.tools %}{{ m.tools | tojson(indent=2) }}{% endif %}{% endfor %}",
    );
    let text = "A sentence of a long conversation. ".repeat(30);
    let messages = (0..4_000).map(|_| json!({ "role": "user", "content": text })).collect();
    let prompt = sandbox.render(&Chat { messages, ..Chat::default() }).unwrap();
    assert_eq!(prompt.len(), 4_000 * (text.trim().len() + "<|user|>".len()));
}

#[test]
fn many_threads_may_render_at_once() {
    let sandbox = sandbox("{{ messages[0].content }}");
    sandbox.warm().unwrap();
    std::thread::scope(|scope| {
        for i in 0..8 {
            let sandbox = &sandbox;
            scope.spawn(move || {
                for j in 0..20 {
                    let text = format!("{i} {j}\n\u{2028} \"é\"");
                    assert_eq!(sandbox.render(&chat(&text)).unwrap(), text);
                }
            });
        }
    });
}

#[test]
fn a_program_that_is_not_there_is_an_error() {
    let templates = Templates::open(br#"{"templates":{"default":""},"tokens":{}}"#).unwrap().unwrap();
    let sandbox = Sandbox::new(&templates, vec!["/nowhere/tstext".into()]);
    assert!(matches!(sandbox.render(&chat("")), Err(TemplateError::Process(_))));
    let silent = Sandbox::new(&templates, vec!["/bin/true".into()]);
    assert!(matches!(silent.render(&chat("")), Err(TemplateError::Process(_))));
}
