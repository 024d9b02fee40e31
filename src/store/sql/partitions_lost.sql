-- Which of these partitions a topic does not have on this node. Primary key.
-- $1 partitions  $2 id of the topic
select n from unnest($1::int[]) n
 where not exists (select from shardmq.partition p
                    where p.partition = n and p.topic_id = $2 and p.state <> 'deleted')
 order by 1
