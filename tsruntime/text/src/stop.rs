//! Stop strings in streamed text.

/// Looks for stop strings in a text that arrives in pieces, and holds back only what may become one.
/// What it finds does not depend on where the pieces were cut.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

/// What may be shown after a piece of text.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Emitted {
    /// New text; nothing of a stop string.
    pub text: String,
    /// The stop string that was found: the end of the text.
    pub stop: Option<String>,
}

impl StopMatcher {
    /// Empty stop strings never match.
    pub fn new(stops: impl IntoIterator<Item = String>) -> StopMatcher {
        StopMatcher {
            stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
            held: String::new(),
            stopped: false,
        }
    }

    /// Adds a piece. The stop string that is complete first wins; of several that end together, the longest. After a stop nothing more is shown.
    pub fn push(&mut self, piece: &str) -> Emitted {
        if self.stopped {
            return Emitted::default();
        }
        self.held.push_str(piece);
        let ends = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|start| (start + stop.len(), start, stop)));
        if let Some((_, start, stop)) = ends.min_by_key(|&(end, start, _)| (end, start)) {
            let stop = Some(stop.clone());
            self.held.truncate(start);
            self.stopped = true;
            return Emitted { text: std::mem::take(&mut self.held), stop };
        }
        let keep = self.stops.iter().map(|stop| self.unfinished(stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Emitted { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// The text that was held back, at the end of the stream.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes of the longest end of the held text that `stop` begins with.
    fn unfinished(&self, stop: &str) -> usize {
        let longest = self.held.len().min(stop.len() - 1);
        let starts = (self.held.len() - longest..self.held.len()).filter(|&at| self.held.is_char_boundary(at));
        starts.map(|at| &self.held[at..]).find(|end| stop.starts_with(end)).map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(stops.iter().map(|stop| stop.to_string()))
    }

    /// All of the text that is shown when `text` comes in the given pieces, and the stop string.
    fn shown<'a>(stops: &[&str], pieces: impl IntoIterator<Item = &'a str>) -> (String, Option<String>) {
        let mut matcher = matcher(stops);
        let mut text = String::new();
        for piece in pieces {
            let emitted = matcher.push(piece);
            text += &emitted.text;
            if emitted.stop.is_some() {
                assert_eq!(matcher.push("more"), Emitted::default());
                return (text + &matcher.finish(), emitted.stop);
            }
        }
        (text + &matcher.finish(), None)
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop_string() {
        let mut matcher = matcher(&["\nUser:", "</s>"]);
        assert_eq!(matcher.push("Hello\n").text, "Hello");
        assert_eq!(matcher.push("Us").text, "");
        assert_eq!(matcher.push("ual <").text, "\nUsual ");
        assert_eq!(matcher.push("/s").text, "");
        assert_eq!(matcher.push("> and more"), Emitted { text: String::new(), stop: Some("</s>".into()) });
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn what_is_held_comes_out_at_the_end() {
        assert_eq!(shown(&["stop"], ["no st", "o"]), ("no sto".into(), None));
        assert_eq!(shown(&[], ["a", "b"]), ("ab".into(), None));
        assert_eq!(shown(&[""], ["a"]), ("a".into(), None));
    }

    #[test]
    fn characters_are_never_cut() {
        assert_eq!(shown(&["é!", "日本x"], ["caf", "é", "? 日", "本", "語"]), ("café? 日本語".into(), None));
        assert_eq!(shown(&["本"], ["日本語"]), ("日".into(), Some("本".into())));
    }

    #[test]
    fn the_cuts_do_not_matter() {
        // Every way to cut a text gives what the whole text gives.
        let cases: [(&[&str], &str); 5] = [
            (&["aab"], "xaaaabaab"),
            (&["abcd", "bc"], "zabcde"),
            (&["bc", "abc"], "zabcd"),
            (&["é€", "€€€"], "a€é€€€€b"),
            (&["abab"], "abaababx"),
        ];
        for (stops, text) in cases {
            let chars: Vec<char> = text.chars().collect();
            let expected =
                shown(stops, chars.iter().map(|char| char.to_string()).collect::<Vec<_>>().iter().map(String::as_str));
            for cuts in 0..1u32 << (chars.len() - 1) {
                let mut pieces = vec![String::new()];
                for (i, char) in chars.iter().enumerate() {
                    if i > 0 && cuts >> (i - 1) & 1 == 1 {
                        pieces.push(String::new());
                    }
                    pieces.last_mut().unwrap().push(*char);
                }
                assert_eq!(shown(stops, pieces.iter().map(String::as_str)), expected, "{stops:?} {pieces:?}");
            }
        }
    }
}
