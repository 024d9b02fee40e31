-- Lets attempts to append a batch name another day, unless the batch is gone or being put back: none who
-- has it too may name a later day than is written here. Primary key.
-- $1 id  $2 day
update shardmq.outbox_batch b set first_day = least(b.first_day, $2), day = greatest(b.day, $2)
 where b.id = $1 and b.state <> 'withdrawn'
returning b.first_day, b.day
