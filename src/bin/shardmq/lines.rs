//! Lines of any bytes from a reader, each with bounded memory.

use std::io;

use tokio::io::{AsyncBufRead, AsyncBufReadExt};

/// One line of the input, without its `\n` and otherwise unchanged.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// From 1.
    pub(crate) number: u64,
    /// Cut off behind the limit.
    pub(crate) bytes: Vec<u8>,
    /// How long it really is.
    pub(crate) len: usize,
}

/// Reads lines. What is behind the last `\n` is a line if it is not empty.
pub(crate) struct Lines<R> {
    reader: R,
    limit: usize,
    current: Line,
}

impl<R: AsyncBufRead + Unpin> Lines<R> {
    /// Keeps at most `limit` bytes of a line.
    pub(crate) fn new(reader: R, limit: usize) -> Self {
        let current = Line { number: 1, bytes: Vec::new(), len: 0 };
        Self { reader, limit, current }
    }

    /// The next line, none at the end. Cancel safe: what was read so far is kept.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Line>> {
        loop {
            let read = self.reader.fill_buf().await?;
            if read.is_empty() {
                return Ok((self.current.len > 0).then(|| self.take()));
            }
            let end = read.iter().position(|byte| *byte == b'\n');
            let part = &read[..end.unwrap_or(read.len())];
            let room = self.limit - self.current.bytes.len();
            self.current.bytes.extend_from_slice(&part[..part.len().min(room)]);
            self.current.len += part.len();
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume(used);
            if end.is_some() {
                return Ok(Some(self.take()));
            }
        }
    }

    fn take(&mut self) -> Line {
        let next = Line { number: self.current.number + 1, bytes: Vec::new(), len: 0 };
        std::mem::replace(&mut self.current, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::BufReader;

    async fn lines(input: &[u8], limit: usize) -> Vec<Line> {
        // A buffer smaller than most lines.
        let mut lines = Lines::new(BufReader::with_capacity(3, input), limit);
        let mut all = Vec::new();
        while let Some(line) = lines.next().await.unwrap() {
            all.push(line);
        }
        all
    }

    #[tokio::test]
    async fn lines_are_unchanged_up_to_their_newline() {
        let all = lines(b"a\r\n\n\xff\xfe long line\n\rlast", 100).await;
        let bytes: Vec<&[u8]> = all.iter().map(|line| line.bytes.as_slice()).collect();
        assert_eq!(bytes, [&b"a\r"[..], b"", b"\xff\xfe long line", b"\rlast"]);
        let numbers: Vec<u64> = all.iter().map(|line| line.number).collect();
        assert_eq!(numbers, [1, 2, 3, 4]);
    }

    #[tokio::test]
    async fn an_end_after_a_newline_is_no_line() {
        assert_eq!(lines(b"a\n", 9).await.len(), 1);
        assert_eq!(lines(b"\n", 9).await.len(), 1);
        assert_eq!(lines(b"", 9).await.len(), 0);
    }

    #[tokio::test]
    async fn a_long_line_is_cut_and_its_length_is_known() {
        let all = lines(b"123456789\nab", 4).await;
        assert_eq!((all[0].bytes.as_slice(), all[0].len), (&b"1234"[..], 9));
        assert_eq!((all[1].bytes.as_slice(), all[1].len), (&b"ab"[..], 2));
    }
}
