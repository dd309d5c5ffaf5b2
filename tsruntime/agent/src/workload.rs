//! Sessions: made up from a seed, or read from a trace.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use crate::AgentError;
use crate::args::AgentArgs;

/// What a user says.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// About this many tokens of code-like text, made from the seed.
    Tokens {
        count: u32,
        seed: u64,
    },
    Text(String),
}

#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// The pause before it.
    pub think: Duration,
    pub input: Input,
    pub output_tokens: u32,
}

/// One agent's conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Session {
    /// Not before this, counted from the start of the run.
    pub start: Duration,
    /// What all sessions begin with.
    pub system: Option<Input>,
    pub turns: Vec<Turn>,
}

/// splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Below `bound`, which is not 0; the bias of at most bound / 2^64 is nothing here.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Exponentially distributed.
    fn pause(&mut self, mean_s: f64) -> Duration {
        let uniform = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        Duration::from_secs_f64(-mean_s * (1.0 - uniform).ln())
    }
}

/// The sessions of one run. Runs at different concurrency share nothing but the system prompt, so that none finds another's cache.
pub fn synthetic(arguments: &AgentArgs, concurrency: u32) -> Vec<Session> {
    let mut random = Random::new(arguments.seed ^ (u64::from(concurrency) << 32));
    let system = arguments.system.min(arguments.first);
    let turns = u64::from(arguments.turns.end() - arguments.turns.start() + 1);
    (0..arguments.sessions.unwrap_or(concurrency))
        .map(|_| {
            let num_turns = arguments.turns.start() + random.below(turns) as u32;
            let mut turn = |index: u32| Turn {
                think: if index == 0 { Duration::ZERO } else { random.pause(arguments.think) },
                input: Input::Tokens {
                    count: if index == 0 { (arguments.first - system).max(1) } else { arguments.next },
                    seed: random.next(),
                },
                output_tokens: arguments.output,
            };
            Session {
                start: Duration::ZERO,
                system: (system > 0).then_some(Input::Tokens { count: system, seed: arguments.seed }),
                turns: (0..num_turns).map(&mut turn).collect(),
            }
        })
        .collect()
}

/// A line of a trace.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    session: String,
    #[serde(default)]
    start_s: f64,
    #[serde(default)]
    think_s: f64,
    input_tokens: Option<u32>,
    content: Option<String>,
    output_tokens: u32,
}

/// The sessions of a trace, in the order of their first lines.
pub fn read_trace(path: &Path) -> Result<Vec<Session>, AgentError> {
    let text = fs::read_to_string(path).map_err(|error| AgentError::Usage(format!("{}: {error}", path.display())))?;
    parse_trace(&text).map_err(|error| AgentError::Usage(format!("{}: {error}", path.display())))
}

fn parse_trace(text: &str) -> Result<Vec<Session>, String> {
    let mut sessions: Vec<Session> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |what: &str| format!("line {}: {what}", number + 1);
        let line: Line = serde_json::from_str(line).map_err(|error| wrong(&error.to_string()))?;
        let seconds = |name: &str, value: f64| {
            Duration::try_from_secs_f64(value).map_err(|_| wrong(&format!("{name} is {value}, wanted seconds")))
        };
        let input = match (line.input_tokens, line.content) {
            (Some(count @ 1..), None) => Input::Tokens { count, seed: number as u64 },
            (None, Some(content)) => Input::Text(content),
            _ => return Err(wrong("wanted either input_tokens, at least 1, or content")),
        };
        if line.output_tokens == 0 {
            return Err(wrong("output_tokens is 0, wanted at least 1"));
        }
        let start = seconds("start_s", line.start_s)?;
        let turn = Turn { think: seconds("think_s", line.think_s)?, input, output_tokens: line.output_tokens };
        let place = *places.entry(line.session).or_insert_with(|| {
            sessions.push(Session { start, system: None, turns: Vec::new() });
            sessions.len() - 1
        });
        sessions[place].turns.push(turn);
    }
    if sessions.is_empty() { Err("no turn in it".into()) } else { Ok(sessions) }
}

impl Input {
    /// The words, for a tokenizer that takes `characters_per_token`.
    pub fn text(&self, characters_per_token: f64) -> String {
        match self {
            Input::Text(text) => text.clone(),
            Input::Tokens { count, seed } => code(*seed, (f64::from(*count) * characters_per_token) as usize),
        }
    }
}

const NAMES: [&str; 24] = [
    "request", "buffer", "index", "value", "result", "token", "page", "config", "path", "state", "queue", "batch",
    "name", "items", "offset", "parser", "client", "cache", "event", "node", "width", "error", "stream", "table",
];

/// At least `characters` of what looks like Python, no two seeds alike.
pub fn code(seed: u64, characters: usize) -> String {
    let mut random = Random::new(seed);
    let mut text = String::with_capacity(characters + 200);
    while text.len() < characters.max(1) {
        let mut name = || NAMES[random.below(NAMES.len() as u64) as usize];
        let (function, first, second, third) = (name(), name(), name(), name());
        let number = random.below(100_000);
        text += &match random.below(4) {
            0 => format!("def {function}_{number}({first}, {second}):\n    return {first}.{third}({second})\n\n"),
            1 => format!(
                "    if {first} is None or {second} > {number}:\n        raise ValueError(\"{third} {function}\")\n"
            ),
            2 => format!("    {first}_{second} = self.{third}[{number}] + {function}({first})\n"),
            _ => format!("for {first} in {second}.{third}():\n    {function}.append(({first}, {number}))\n"),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: AgentArgs,
    }

    fn arguments(words: &str) -> AgentArgs {
        Line::parse_from(std::iter::once("bench").chain(words.split_whitespace())).arguments
    }

    #[test]
    fn sessions_depend_on_the_seed_alone() {
        let some = arguments("--first 1000 --next 50 --output 20 --turns 3-6 --system 200");
        let sessions = synthetic(&some, 4);
        assert_eq!(sessions, synthetic(&some, 4));
        assert_ne!(sessions, synthetic(&arguments("--seed 2"), 4));
        assert_eq!(sessions.len(), 4);
        for session in &sessions {
            assert_eq!(session.system, Some(Input::Tokens { count: 200, seed: 1 }));
            assert!((3..=6).contains(&session.turns.len()));
            assert_eq!(session.turns[0].think, Duration::ZERO);
            assert!(matches!(session.turns[0].input, Input::Tokens { count: 800, .. }));
            assert!(matches!(session.turns[1].input, Input::Tokens { count: 50, .. }));
        }
        let texts: std::collections::HashSet<String> =
            sessions.iter().flat_map(|session| &session.turns).map(|turn| turn.input.text(3.0)).collect();
        assert_eq!(texts.len(), sessions.iter().map(|session| session.turns.len()).sum::<usize>());
    }

    #[test]
    fn text_is_as_long_as_asked() {
        for count in [1, 10, 5000] {
            let length = Input::Tokens { count, seed: 9 }.text(3.5).len();
            assert!(length >= (f64::from(count) * 3.5) as usize && length < (f64::from(count) * 3.5) as usize + 200);
        }
    }

    #[test]
    fn traces() {
        let sessions = parse_trace(
            "{\"session\":\"a\",\"start_s\":1,\"input_tokens\":5,\"output_tokens\":2}\n\n\
             {\"session\":\"b\",\"content\":\"hi\",\"output_tokens\":1}\n\
             {\"session\":\"a\",\"think_s\":0.5,\"content\":\"more\",\"output_tokens\":3}\n",
        )
        .unwrap();
        assert_eq!(sessions.len(), 2);
        assert_eq!((sessions[0].start, sessions[0].turns.len()), (Duration::from_secs(1), 2));
        assert_eq!(sessions[0].turns[1].think, Duration::from_millis(500));
        assert_eq!(sessions[1].turns[0].input, Input::Text("hi".into()));
        for (text, wanted) in [
            ("", "no turn"),
            ("{}", "line 1: missing field `session`"),
            ("{\"session\":\"a\",\"output_tokens\":1}", "either input_tokens"),
            ("{\"session\":\"a\",\"input_tokens\":0,\"output_tokens\":1}", "either input_tokens"),
            ("{\"session\":\"a\",\"input_tokens\":1,\"output_tokens\":0}", "output_tokens is 0"),
            ("{\"session\":\"a\",\"input_tokens\":1,\"output_tokens\":1,\"start_s\":-1}", "start_s is -1"),
            ("{\"session\":\"a\",\"input_tokens\":1,\"output_tokens\":1,\"x\":1}", "unknown field `x`"),
        ] {
            let error = parse_trace(text).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
