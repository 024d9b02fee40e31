-- Dead letters of this node by id, after one: up to so many, and over the first so many bytes. Null
-- leaves a condition out. Primary key, or index dead_letter_group.
-- $1 ids  $2 topic  $3 group  $4 partition  $5 text of the last error  $6 after this id  $7 how many
-- $8 bytes
select d.message_id,
       coalesce(d.headers ->> 'shardmq.uid', format('%s:%s:%s', d.producer, d.sequence, d.message_index)),
       d.topic, d.partition, d.key, d.headers, d.payload, d.appended_at,
       d.id, d.group_name, d.first_seen, d.died_at, d.attempts, d.failures::text
  from (select d.*, sum(coalesce(octet_length(d.payload), 0)) over (order by d.id) as sum_bytes
          from (select * from shardmq.dead_letter d
                 where ($1::bigint[] is null or d.id = any ($1))
                   and ($2::text is null or d.topic = $2)
                   and ($3::text is null or d.group_name = $3)
                   and ($4::int is null or d.partition = $4)
                   and ($5::text is null or strpos(d.failures -> -1 ->> 'error', $5) > 0)
                   and d.id > $6::bigint
                 order by d.id limit $7::int) d) d
 where d.sum_bytes - coalesce(octet_length(d.payload), 0) < $8::bigint
 order by d.id
