-- Says that a batch is divided, or being put back; not where it is the other. Returns the days that attempts
-- have named until then: those of a batch that is being put back are final. Primary key.
-- $1 id  $2 state
update shardmq.outbox_batch b set state = $2
 where b.id = $1 and b.state in ('frozen', $2)
returning b.first_day, b.day
