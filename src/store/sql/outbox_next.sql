-- The next batches of a partition, in order: a few, and of those after the first no more than some bytes.
-- Index (partition, id).
-- $1 partition  $2 beyond this batch  $3 bytes
select b.id, b.partition, b.topic, b.generation, b.producer, b.first_day, b.day, b.state, b.count, b.bytes,
       b.ids, b.keys, b.headers, b.payloads, b.uids, b.topic_id
  from (select w.id, sum(w.bytes) over (order by w.id) - w.bytes as before
          from (select x.id, x.bytes from shardmq.outbox_batch x
                 where x.partition = $1 and x.id > $2 order by x.id limit 8) w) n
  join shardmq.outbox_batch b on b.id = n.id
 where n.before < $3
 order by b.id
