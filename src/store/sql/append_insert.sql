-- Appends a batch behind the last row of its day table, if everything that the client believes is
-- true. Index probes only: the last row and (producer, sequence) of the day table, the primary keys of
-- partition and refused. No row comes back where it did not insert; append_batch() says why.
-- Without the lock in shardmq.held (begin failed, or the partition was not got) it inserts nothing.
-- $1 count  $2 bytes  $3 producer  $4 sequence  $5 keys  $6 headers  $7 payloads  $8 id of the topic
-- $9 generation
insert into shardmq.batch_{partition}_{day}
       (base_id, count, bytes, appended_at, producer, sequence, keys, headers, payloads)
select next.id, $1::int, $2::int,
       greatest(shardmq.clock(), next.appended_at, shardmq.day_start({day_number})),
       $3::uuid, $4::bigint, $5::text[], $6::jsonb[], $7::bytea[]
  from shardmq.partition p,
       lateral (select coalesce((select b.base_id + b.count from shardmq.batch_{partition}_{day} b
                                  order by b.base_id desc limit 1), {first_id}) as id,
                       (select b.appended_at from shardmq.batch_{partition}_{day} b
                         order by b.base_id desc limit 1) as appended_at) next
 where p.partition = {partition} and p.topic_id = $8::uuid and p.generation = $9::int
   and p.state = 'open' and p.day = {day_number}
   and position(',{partition},' in current_setting('shardmq.held', true)) > 0
   and shardmq.day_of(shardmq.clock()) <= {day_number}
   and not exists (select from shardmq.refused r
                    where r.partition = {partition} and r.producer = $3 and r.sequence = $4)
   and not exists (select from shardmq.batch_{partition}_{day} b
                    where b.producer = $3 and b.sequence > $4)
   and next.id + $1 - 1 <= {last_id}
on conflict (producer, sequence) do nothing
returning base_id
